"""What two models say of the same texts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fdiv.chat import encode_prompts
from rlhf_fdiv.data import COMPLETIONS, Rows, tokenize_completions
from rlhf_fdiv.models import Policy, in_micro_batches
from rlhf_fdiv.sequences import Sequences, wide


@torch.no_grad()
def score_both(
    policy: nn.Module, reference: nn.Module, sequences: Sequences, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence log π and log a, and Σ_t KL(π_t‖a_t) of the visited states, exact over the vocabulary; [B] each, nats.

    The sum has the expectation of log π − log a (chain rule) and less variance.
    """
    models, columns = (Policy(policy), Policy(reference)), []
    for rows in torch.arange(len(sequences)).split(batch_size):
        part = sequences[rows]
        ours, theirs = (model(part) for model in models)
        log_pi, log_a = (wide(x.logits).log_softmax(-1) for x in (ours, theirs))
        kl = ((log_pi.exp() * (log_pi - log_a)).sum(-1) * part.mask).sum(-1)
        columns.append(torch.stack([ours.log_probs.sum(-1), theirs.log_probs.sum(-1), kl], 1).double().cpu())
    return torch.cat(columns).unbind(1)  # type: ignore[return-value]


def score(lm: nn.Module, sequences: Sequences, batch_size: int) -> Tensor:
    """log-prob of each completion under one model, [B] in float64, nats."""
    return in_micro_batches(Policy(lm), sequences, batch_size).log_probs.double().sum(-1).cpu()


@torch.no_grad()
def perplexity(lm: Any, tokenizer: Any, rows: Rows, batch_size: int) -> dict[str, float]:
    """Of the completions given their prompts: perplexity by token (EOS included) and bits by character."""
    device = next(lm.parameters()).device
    nats = tokens = characters = 0.0
    rows = sorted(rows, key=lambda r: len(r["completion"]))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompts, texts = ([r[key] for r in batch] for key in COMPLETIONS)
        prompt_ids, ids = encode_prompts(prompts, tokenizer), tokenize_completions(prompts, texts, tokenizer, 10**9)
        sequences = Sequences.of(prompt_ids, ids, device)
        nats -= float(Policy(lm)(sequences).log_probs.sum())
        tokens += float(sequences.mask.sum())
        characters += sum(len(r["completion"]) for r in batch)
    return {"perplexity": math.exp(nats / tokens), "bits_per_character": nats / math.log(2) / characters}
