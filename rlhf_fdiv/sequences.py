"""Token log-probabilities, masks and the layout of a batch. Shapes: B completions, P prompt tokens, T completion tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass
class Sequences:
    """Prompts padded on the left, completions padded on the right; the completion of a finished text includes its EOS.

    A completion without EOS was cut at the maximal length T: the language is that of texts of at most T tokens, on which
    policy and reference are both normalised, so nothing is forced and no EOS is pretended.
    """

    prompt_ids: Tensor  # [B, P]
    prompt_mask: Tensor  # [B, P], 1 on tokens
    completion_ids: Tensor  # [B, T]
    mask: Tensor  # [B, T], 1 on tokens, EOS included

    def __post_init__(self) -> None:
        if self.prompt_ids.shape != self.prompt_mask.shape or self.completion_ids.shape != self.mask.shape:
            raise ValueError("ids and masks differ in shape")

    def __len__(self) -> int:
        return len(self.completion_ids)

    def __getitem__(self, rows: Any) -> Sequences:
        """Some rows, without the padding that only the others needed."""
        part = Sequences(*(getattr(self, x.name)[rows] for x in fields(self)))
        width = max(int(part.prompt_mask.sum(1).max()), 1)
        length = max(int(part.mask.sum(1).max()), 1)
        return Sequences(
            part.prompt_ids[:, -width:],
            part.prompt_mask[:, -width:],
            part.completion_ids[:, :length],
            part.mask[:, :length],
        )

    @classmethod
    def of(cls, prompts: list[list[int]], completions: list[list[int]], device: Any = None) -> Sequences:
        """The rows of token ids, padded with 0."""
        return cls(*(x.to(device) for x in (*pad(prompts, 0, "left"), *pad(completions, 0, "right"))))

    @classmethod
    def cat(cls, parts: list[Sequences]) -> Sequences:
        """The rows of several batches, padded to the longest of them."""
        sides = ("left", "left", "right", "right")
        columns = ([getattr(part, x.name) for part in parts] for x in fields(cls))
        return cls(*(pad_to_longest(c, side) for c, side in zip(columns, sides, strict=True)))

    def model_inputs(self) -> dict[str, Tensor]:
        """What a causal LM needs; position_ids because absolute positions are wrong under left padding without them."""
        attention_mask = torch.cat([self.prompt_mask, self.mask], 1).long()
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return {
            "input_ids": torch.cat([self.prompt_ids, self.completion_ids], 1),
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }


def pad(rows: list[list[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
    """Lists of token ids → ids [B, longest] and mask [B, longest], padded on "left" or "right"."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), value), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def pad_to_longest(parts: list[Tensor], side: str) -> Tensor:
    """[B_i, T_i] each → [Σ B_i, max T_i], zeros on "left" or "right"."""
    width = max(x.shape[1] for x in parts)
    return torch.cat([F.pad(x, (width - x.shape[1], 0) if side == "left" else (0, width - x.shape[1])) for x in parts])


def wide(logits: Tensor) -> Tensor:
    """In float32, or wider where they are: the precision of every log-prob."""
    return logits if logits.dtype == torch.float64 else logits.float()


def token_log_probs(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """log π(y_t | x, y_<t) in float32 or wider, zero where masked; logits [B, T, V], tokens and mask [B, T] → [B, T].

    cross_entropy fuses log_softmax and gather, in half the memory of doing them one after the other.
    """
    labels = tokens.masked_fill(mask == 0, -100)  # ignored, even where padding is a token that the model rules out
    return -F.cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), reduction="none").view_as(tokens)


def chunked_log_probs(
    head: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor, mask: Tensor, chunk: int
) -> Tensor:
    """`token_log_probs` of head(hidden), hidden [B, T, H], with the logits of `chunk` tokens in memory at a time."""

    def of(hidden: Tensor, tokens: Tensor) -> Tensor:
        return -F.cross_entropy(wide(head(hidden)), tokens, reduction="none")

    kept = mask.bool()
    parts = zip(hidden[kept].split(chunk), tokens[kept].split(chunk), strict=True)
    values = torch.cat([checkpoint(of, *part, use_reentrant=False) for part in parts])
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(kept, values)


def sequence_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Σ over a completion's tokens, [B, T] → [B]. Never a mean: length-normalising changes the objective."""
    return (x * mask).sum(-1)


def at_last_token(score: Tensor, mask: Tensor) -> Tensor:
    """[B] → [B, T]: the score paid at the last token of the completion, never at padding."""
    last = mask.long().cumsum(1).argmax(1)
    return torch.zeros(mask.shape, dtype=score.dtype, device=score.device).scatter(1, last[:, None], score[:, None])
