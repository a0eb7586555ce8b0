"""What needs no estimate: every text of a language small enough to enumerate."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from rlhf_fdiv import divergences
from rlhf_fdiv.divergences import Divergence
from rlhf_fdiv.metrics.likelihood import score
from rlhf_fdiv.sequences import Sequences

LIMIT = 200_000


def all_texts(vocab_size: int, stops: list[int], length: int) -> list[list[int]]:
    """Every completion of at most `length` tokens: those that end with one of `stops`, and those that are cut. ValueError for
    too many."""
    others = [token for token in range(vocab_size) if token not in stops]
    count = len(stops) * sum(len(others) ** n for n in range(length)) + len(others) ** length
    if count > LIMIT:
        raise ValueError(f"{count:,} texts of at most {length} tokens cannot be enumerated (limit {LIMIT:,})")
    ended = [[*t, stop] for n in range(length) for t in itertools.product(others, repeat=n) for stop in stops]
    return ended + [list(t) for t in itertools.product(others, repeat=length)]


def log_probs_of_all(lm: Any, prompts: list[list[int]], texts: list[list[int]], batch_size: int) -> Tensor:
    """log π(y|x) of every text, [P, N] in float64, normalised over them to the digits of the model's own dtype."""
    device = next(lm.parameters()).device
    rows = [score(lm, Sequences.of([prompt] * len(texts), texts, device), batch_size) for prompt in prompts]
    return torch.stack(rows).log_softmax(1)


def exact_report(fs: list[Divergence], log_pi: Tensor, log_a: Tensor, log_p: Tensor, reward: Tensor) -> dict[str, Any]:
    """Divergences of π to target and reference, means over prompts in nats; log-probs and reward of every text, [P, N].

    `recall` is the share of the target that the policy covers, the mass p of texts with π > p/10; `precision` the share of
    the policy that the target covers, the mass π of texts with p > π/10. `frontier` is the most reward that any policy can
    have at its KL to the reference: a·exp(r/β) for β from a thirtieth of the reward's spread to thirty times it.
    """

    def mean(x: Tensor) -> float:
        return float(x.mean())

    def figures(log_q: Tensor) -> dict[str, float]:
        q = log_q.exp()
        reached = [torch.where(q > 0, q * x, 0.0) for x in (reward, log_q - log_a)]  # 0 · −inf where a target is zero
        return dict(zip(("reward", "kl_reference"), (mean(x.sum(1)) for x in reached), strict=True))

    pi, p, spread = log_pi.exp(), log_p.exp(), float(reward.std())
    betas = spread * torch.logspace(-1.5, 1.5, 25) if spread > 0 and bool(reward.isfinite().all()) else torch.zeros(0)
    return {
        **figures(log_pi),
        "entropy": mean(torch.special.entr(pi).sum(1)),
        "recall": mean((p * (pi > p / 10)).sum(1)),
        "precision": mean((pi * (p > pi / 10)).sum(1)),
        "to_target": {divergences.label(f): mean(divergences.exact(f, log_pi, log_p)) for f in fs},
        "to_reference": {divergences.label(f): mean(divergences.exact(f, log_pi, log_a)) for f in fs},
        "target": figures(log_p),
        "frontier": [{"beta": b, **figures((log_a + reward / b).log_softmax(1))} for b in betas.tolist()],
    }
