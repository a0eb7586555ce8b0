"""Completions from a policy: an own decode loop (the default) or Hugging Face `generate`, one config key apart. For those
of a vLLM server see stages/policy_server.py.

Always at temperature 1 over the full vocabulary, so that log-probs are those of the distribution that was sampled.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from rlhf_fdiv.chat import stop_ids
from rlhf_fdiv.estimators import importance_weights
from rlhf_fdiv.models import under_adapter
from rlhf_fdiv.sequences import Sequences, pad, pad_to_longest, sequence_sum, wide


@dataclass
class Rollout:
    """K completions for each of P prompts, in consecutive rows: B = P × K."""

    sequences: Sequences
    log_probs: Tensor  # [B, T], of the very softmax that was sampled
    entropy: Tensor  # [B, T], of the same softmax, in nats
    prompts: list[int]  # [P], row numbers of the prompt data
    own: Tensor | None = None  # [B], which completions the policy itself drew; None for all
    log_mixture: Tensor | None = None  # [B], log μ(y|x) where that is not π

    @property
    def drawn(self) -> Tensor:
        """Which completions the policy itself drew, [B]."""
        everyone = torch.ones_like(self.sequences.mask[:, 0], dtype=torch.bool)
        return everyone if self.own is None else self.own.to(everyone.device)

    @property
    def log_mu(self) -> Tensor:
        """The log-prob of a completion under what sampled it, [B]: the policy itself, a mixture, or a server."""
        return sequence_sum(self.log_probs, self.sequences.mask) if self.log_mixture is None else self.log_mixture

    def weights(self, cap: float) -> Tensor | None:
        """Truncated importance weights π/μ, [B]; None on policy."""
        if self.log_mixture is None:
            return None
        return importance_weights(sequence_sum(self.log_probs, self.sequences.mask), self.log_mixture, cap)

    def off_policy(self, log_pi: Tensor, log_a: Tensor, reference_share: float) -> Rollout:
        """The same completions as samples of μ = (1 − share)·π + share·a; log π and log a by token, [B, T].

        Weighted by the mixture that might have drawn them, not by the part that did (the balance heuristic of Veach and
        Guibas 1995): π/μ is at most 1/(1 − share), and p/μ stays bounded wherever p/a is. With a share of 0, μ is what the
        engine said of them.
        """
        if not reference_share:
            return replace(self, log_probs=log_pi, log_mixture=self.log_mu)
        by_text = [sequence_sum(x, self.sequences.mask) for x in (log_pi, log_a)]
        shares = math.log1p(-reference_share), math.log(reference_share)
        log_mixture = torch.logaddexp(by_text[0] + shares[0], by_text[1] + shares[1])
        return replace(self, log_probs=log_pi, log_mixture=log_mixture)

    def token_ids(self) -> list[list[int]]:
        rows = zip(self.sequences.completion_ids, self.sequences.mask.bool(), strict=True)
        return [ids[keep].tolist() for ids, keep in rows]

    def texts(self, tokenizer: Any) -> list[str]:
        return tokenizer.batch_decode(self.token_ids(), skip_special_tokens=True)

    def finished(self, stops: list[int]) -> Tensor:
        """[B], whether the completion ended by itself."""
        return (_is_any(self.sequences.completion_ids, stops) & self.sequences.mask.bool()).any(1)


def uniforms(seed: int, step: int, rows: int, length: int, stream: int = 0) -> Tensor:
    """The random stream of every completion of one step, [rows, length] in float64.

    By global row, hence the same on any number of processes, for any policy (paired comparisons) and after a resume.
    """
    # torch seeds its CPU generator with the low 32 bits alone, so that is where streams must differ
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step + stream * 2**30) % 2**32)
    return torch.rand(rows, length, generator=generator, dtype=torch.float64)


@torch.no_grad()
def sample(
    lm: nn.Module, tokenizer: Any, prompts: list[list[int]], num_generations: int, noise: Tensor, engine: str = "cached"
) -> tuple[Sequences, Tensor, Tensor]:
    """Sequences, log-probs and entropies of `num_generations` completions a prompt; `noise` [B, T] sets T and the draws."""
    device, stops = next(lm.parameters()).device, stop_ids(tokenizer)
    prompt_ids, prompt_mask = (x.to(device) for x in pad(prompts, tokenizer.pad_token_id, "left"))
    draw = functools.partial(_hf_generate, tokenizer.pad_token_id) if engine == "generate" else _decode
    tokens, log_probs, entropy = draw(lm, prompt_ids, prompt_mask, num_generations, noise.to(device), stops)
    mask = _until_stop(tokens, stops)
    prompt_ids, prompt_mask = (x.repeat_interleave(num_generations, 0) for x in (prompt_ids, prompt_mask))
    return Sequences(prompt_ids, prompt_mask, tokens, mask), torch.where(mask.bool(), log_probs, 0.0), entropy * mask


def sample_each(
    lms: list[Any], choice: Tensor, tokenizer: Any, prompts: list[list[int]], noise: Tensor, engine: str = "cached"
) -> tuple[Sequences, Tensor, Tensor]:
    """As `sample`, one completion for each of B prompts, from the model that `choice` [B] names; `lms` are contexts."""
    parts, order = [], []
    for i, context in enumerate(lms):
        rows = (choice == i).nonzero().squeeze(1)
        if len(rows):
            with context as lm:
                parts.append(sample(lm, tokenizer, [prompts[j] for j in rows.tolist()], 1, noise[rows], engine))
            order.append(rows)
    back = torch.cat(order).argsort()
    sequences = Sequences.cat([part[0] for part in parts])[back]
    log_probs = pad_to_longest([part[1] for part in parts], "right")[back]
    return sequences, log_probs, pad_to_longest([part[2] for part in parts], "right")[back]


def _decode(
    lm: Any, prompt_ids: Tensor, prompt_mask: Tensor, num_generations: int, noise: Tensor, stops: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Each prompt is read once and its cache expanded; completions that have ended leave the batch."""
    cache = _in_place(DynamicCache(config=lm.config))
    ids, attention, position = prompt_ids, prompt_mask, (prompt_mask.cumsum(1) - 1).clamp(min=0)
    (rows, length), device = noise.shape, noise.device
    ends, alive = torch.tensor(stops, device=device), torch.arange(rows, device=device)
    tokens = torch.full((rows, length), stops[0], device=device)
    for t in range(length):
        out = lm(
            input_ids=ids,
            attention_mask=attention,
            position_ids=position,
            past_key_values=cache,
            logits_to_keep=1,
        )
        logits = wide(out.logits[:, -1])
        if t == 0:
            cache.batch_repeat_interleave(num_generations)
            each = (logits, attention, position[:, -1:])
            logits, attention, position = (x.repeat_interleave(num_generations, 0) for x in each)
            log_probs, entropy = torch.zeros(2, rows, length, dtype=logits.dtype, device=device)
        token, log_prob, spread = _inverse_cdf(logits, noise[alive, t])
        tokens[alive, t], log_probs[alive, t], entropy[alive, t] = token, log_prob, spread
        going = torch.isin(token, ends, invert=True).nonzero().squeeze(1)
        if t + 1 == length or not len(going):
            break
        if len(going) < len(alive):
            cache.batch_select_indices(going)
            alive, token, attention, position = alive[going], token[going], attention[going], position[going]
        ids, position = token[:, None], position + 1
        attention = torch.cat([attention, torch.ones_like(ids)], 1)
    return tokens[:, : t + 1], log_probs[:, : t + 1], entropy[:, : t + 1]


class _Appending(DynamicLayer):
    """A cache layer with room to spare: a new token is written behind the others, which need not be copied for it."""

    room = 64

    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", key_states)
        self.values = self._append("values", value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers.clear()  # of more rows than are left: those of all layers would lie beside what was selected

    def _append(self, which: str, new: Tensor) -> Tensor:
        old, buffer = getattr(self, which), self.buffers.get(which)
        if not old.numel():
            return new
        length, total = old.shape[-2], old.shape[-2] + new.shape[-2]
        # what was repeated or selected since is no longer a part of the buffer
        if buffer is None or buffer.data_ptr() != old.data_ptr() or buffer.shape[-2] < total:
            buffer = self.buffers[which] = new.new_empty(*new.shape[:-2], total + self.room, new.shape[-1])
            buffer[..., :length, :] = old
        buffer[..., length:total, :] = new
        return buffer[..., :total, :]


def _in_place(cache: DynamicCache) -> DynamicCache:
    """The cache with its plain layers made appending; those of sliding windows stay as they are."""
    cache.layers = [_Appending() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _inverse_cdf(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with P(token) = softmax(logits) from u ~ U[0, 1), their log-probs and the entropies, [B] each.

    u and all sums are in float64: in float32 the tail of a 50k vocabulary would be sampled wrongly. First the block of tokens
    that u falls into and then the token in it, since a sum costs half of a cumulative one.
    """
    log_p = torch.log_softmax(wide(logits), -1)
    p = log_p.exp()
    blocks = F.pad(p, (0, -p.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    mass = blocks.sum(-1, dtype=torch.float64)
    block, rest = _search(mass, u[:, None] * mass.sum(-1, keepdim=True))
    within, _ = _search(blocks[torch.arange(len(p), device=p.device), block.squeeze(1)].double(), rest)
    token = block * _BLOCK + within
    log_prob = log_p.gather(1, token).squeeze(1)
    return token.squeeze(1), log_prob, -torch.linalg.vecdot(p, log_p.clamp_(min=-1e4))


_BLOCK = 256


def _search(mass: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """The first item whose cumulative `mass` [B, n] exceeds `goal` [B, 1], and how far into it that is; [B, 1] each.

    A goal that rounding has put at the end falls on the last item with any mass.
    """
    cumulative = mass.cumsum(-1)
    goal = goal.minimum(cumulative[:, -1:].nextafter(torch.zeros_like(goal)))
    item = torch.searchsorted(cumulative, goal, right=True).clamp(max=mass.shape[-1] - 1)
    return item, (goal - (cumulative - mass).gather(1, item)).clamp(min=0)


def _is_any(tokens: Tensor, ids: list[int]) -> Tensor:
    return torch.isin(tokens, torch.tensor(ids, device=tokens.device))


def _until_stop(tokens: Tensor, stops: list[int]) -> Tensor:
    """1 up to and including the first token that ends a completion, [B, T]."""
    ends = _is_any(tokens, stops).long()
    return (ends.cumsum(1) - ends == 0).long()


@contextlib.contextmanager
def _neutral(lm: Any) -> Iterator[None]:
    """Without the model's own generation config: its repetition penalty or min_p would shape the samples, unseen."""
    base = under_adapter(lm)
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _hf_generate(
    pad_id: int, lm: Any, prompt_ids: Tensor, prompt_mask: Tensor, num_generations: int, noise: Tensor, stops: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same distribution from `generate`; its sampler is seeded from the noise, so it repeats too."""
    with _neutral(lm), torch.random.fork_rng(devices=[prompt_ids.device] if prompt_ids.is_cuda else []):
        torch.manual_seed(int(noise[0, 0] * 2**53))  # all its bits: on a CPU the low 32 of them are the seed
        out = lm.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            num_return_sequences=num_generations,
            max_new_tokens=noise.shape[1],
            do_sample=True,
            top_k=0,  # transformers 5 truncates to 50 tokens unless told not to
            top_p=1.0,
            temperature=1.0,
            eos_token_id=stops,
            pad_token_id=pad_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens, log_p = out.sequences[:, prompt_ids.shape[1] :], torch.stack(out.logits, 1).log_softmax(-1)
    log_probs = log_p.gather(-1, tokens[..., None]).squeeze(-1)
    return tokens, log_probs, -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)
