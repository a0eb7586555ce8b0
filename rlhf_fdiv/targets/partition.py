"""log Z(x) = log E_a[exp(potential)]: a running estimate for each prompt, in log space."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch
from torch import Tensor


class LogPartition:
    """Running log Ẑ(x) by importance sampling, Ẑ(x) = mean_k exp(log p̃ − log π_old) over a prompt's completions.

    Each prompt's estimates are averaged with equal weight, then exponentially once `horizon` of them are in, so that
    early, poor ones fade. A prompt is its row number in the prompt data; the state goes into the checkpoint. The first
    estimate of an unseen prompt is that of its own batch. At most `capacity` prompts are kept, those visited last.
    Samples of the reference (`warm_start`) do not fade: they weigh as many as they are beside the last `horizon` batches,
    for a policy that has collapsed knows of no Z but its own.
    """

    def __init__(self, horizon: int = 50, capacity: int = 1_000_000) -> None:
        self.horizon, self.capacity = horizon, capacity
        self._kept: dict[int, tuple[float, int]] = {}  # log Ẑ and visits, the longest unvisited prompt first
        self._reference: dict[int, tuple[float, int]] = {}  # log Ẑ from samples of the reference, and how many

    def warm_start(self, prompts: list[int], potential: Tensor) -> None:
        """Takes log p̃ − log a of samples of the reference, [P, N]."""
        log_z = torch.logsumexp(potential.double(), 1) - math.log(potential.shape[1])
        self._reference.update(zip(prompts, ((x, potential.shape[1]) for x in log_z.tolist()), strict=True))

    def update(self, prompts: list[int], log_weights: Tensor) -> Tensor:
        """Takes log p̃ − log π_old, [P, K] (−inf where p̃ = 0), and returns the running log Ẑ, [P]."""
        batch = torch.logsumexp(log_weights.double(), 1) - math.log(log_weights.shape[1])
        for prompt, new in zip(prompts, batch.tolist(), strict=True):
            old, visits = self._kept.pop(prompt, (-math.inf, 0))
            rate = max(1 / (visits + 1), 1 / self.horizon)
            self._kept[prompt] = _log_mix(old, new, rate), visits + 1
        log_z = [self._of(p, log_weights.shape[1]) for p in prompts]
        for longest_unvisited in list(islice(self._kept, max(len(self._kept) - self.capacity, 0))):
            del self._kept[longest_unvisited]
        return torch.tensor(log_z, dtype=log_weights.dtype, device=log_weights.device)

    def _of(self, prompt: int, k: int) -> float:
        """The running estimate from batches of k, with the reference's samples where there are some."""
        (log_z, visits), (reference, n) = self._kept[prompt], self._reference.get(prompt, (-math.inf, 0))
        seen = k * min(visits, self.horizon)
        return _log_mix(reference, log_z, seen / (seen + n))

    def state_dict(self) -> dict[str, Any]:
        kept = {"prompts": list(self._kept), "kept": list(self._kept.values())}
        return {**kept, "reference": list(self._reference.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        kept = ((float(log_z), int(visits)) for log_z, visits in state["kept"])
        self._kept = dict(zip(map(int, state["prompts"]), kept, strict=True))
        self._reference = {int(prompt): (float(log_z), int(n)) for prompt, (log_z, n) in state.get("reference", ())}


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
