"""log Z(x) = log E_a[exp(potential)]: a running estimate for each prompt, in log space."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class LogPartition:
    """Running log Ẑ(x) by importance sampling, Ẑ(x) = mean_k exp(log p̃ − log π_old) over a prompt's completions.

    Each prompt's estimates are averaged with equal weight, then exponentially once `horizon` of them are in, so that
    early, poor ones fade. A prompt is its row number in the prompt data; the state goes into the checkpoint. The first
    estimate of an unseen prompt is that of its own batch.
    """

    def __init__(self, horizon: int = 50) -> None:
        self.horizon = horizon
        self._log_z: dict[int, float] = {}
        self._count: dict[int, int] = {}

    def update(self, prompts: list[int], log_weights: Tensor) -> Tensor:
        """Takes log p̃ − log π_old, [P, K] (−inf where p̃ = 0), and returns the running log Ẑ, [P]."""
        batch = torch.logsumexp(log_weights.double(), 1) - math.log(log_weights.shape[1])
        for prompt, new in zip(prompts, batch.tolist(), strict=True):
            n = self._count[prompt] = self._count.get(prompt, 0) + 1
            rate = max(1 / n, 1 / self.horizon)
            old = self._log_z.get(prompt, -math.inf)
            self._log_z[prompt] = _log_mix(old, new, rate)
        return torch.tensor([self._log_z[p] for p in prompts], dtype=log_weights.dtype, device=log_weights.device)

    def state_dict(self) -> dict[str, Any]:
        return {"log_z": dict(self._log_z), "count": dict(self._count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._log_z = {int(k): float(v) for k, v in state["log_z"].items()}
        self._count = {int(k): int(v) for k, v in state["count"].items()}


def _log_mix(old: float, new: float, rate: float) -> float:
    """log((1 − rate)·e^old + rate·e^new)."""
    parts = [math.log1p(-rate) + old if rate < 1 else -math.inf, math.log(rate) + new]
    top = max(parts)
    return top + math.log(sum(math.exp(x - top) for x in parts)) if top > -math.inf else -math.inf


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(Σw)²/Σw² over the last dimension, from log weights: K equal weights give K; all-zero weights give 0."""
    top = log_weights.amax(-1, keepdim=True)
    w = torch.where(top == -math.inf, 0.0, (log_weights - top).exp())
    return w.sum(-1) ** 2 / (w**2).sum(-1).clamp(min=1)  # the largest weight is 1
