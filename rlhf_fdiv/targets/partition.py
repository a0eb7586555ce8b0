"""log Z(x) = log E_a[exp(potential)]: a running estimate for each prompt, in log space."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class LogPartition:
    """Running log Ẑ(x) by importance sampling, Ẑ(x) = mean_k exp(log p̃ − log π_old) over a prompt's completions.

    A visit weighs as much as the policy covers of the reference: the mean of a/π_old, which is 1 for full support, over all
    completions of the step before (so that weight and estimate are independent given the policy). A policy that has
    collapsed knows of no Z but its own, and must not overrule what was seen earlier. Weights add up to at most `horizon`,
    beyond which older visits fade; samples of the reference (`warm_start`) do not fade, and weigh as many as they are.

    A prompt is its row number in the prompt data. The state goes into the checkpoint. The first estimate of an unseen prompt
    is that of its own batch.
    """

    def __init__(self, horizon: int = 50) -> None:
        self.horizon = horizon
        self._kept: dict[int, tuple[float, float]] = {}  # log Ẑ and weight
        self._reference: dict[int, tuple[float, int]] = {}  # log Ẑ from samples of the reference, and how many
        self.coverage = 1.0

    def warm_start(self, prompts: list[int], potential: Tensor) -> None:
        """Takes log p̃ − log a of samples of the reference, [P, N]."""
        log_z = _log_mean(potential, 1)
        self._reference.update(zip(prompts, ((x, potential.shape[1]) for x in log_z.tolist()), strict=True))

    def update(self, prompts: list[int], log_weights: Tensor, log_ratio: Tensor | None = None) -> Tensor:
        """Takes log p̃ − log π_old (−inf where p̃ = 0) and log a − log π_old, [P, K] each; the running log Ẑ, [P].

        Without `log_ratio` every visit weighs the same.
        """
        for prompt, new in zip(prompts, _log_mean(log_weights, 1).tolist(), strict=True):
            old, weight = self._kept.get(prompt, (-math.inf, 0.0))
            weight = min(weight + self.coverage, self.horizon)
            self._kept[prompt] = _log_mix(old, new, self.coverage / weight), weight
        log_z = self.of(prompts, log_weights.shape[1]).to(log_weights)
        if log_ratio is not None:
            self.coverage = min(max(float(_log_mean(log_ratio.flatten(), 0).exp()), 1e-9), 1.0)
        return log_z

    def of(self, prompts: list[int], k: int) -> Tensor:
        """The running log Ẑ of prompts that were visited, by batches of k, with the reference's samples where there are some;
        [P] in float64."""
        found = []
        for prompt in prompts:
            (log_z, weight), (reference, n) = self._kept[prompt], self._reference.get(prompt, (-math.inf, 0))
            found.append(_log_mix(reference, log_z, k * weight / (k * weight + n)))
        return torch.tensor(found, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        kept = {"prompts": list(self._kept), "kept": list(self._kept.values()), "coverage": self.coverage}
        return {**kept, "reference": list(self._reference.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        kept = ((float(log_z), float(weight)) for log_z, weight in state["kept"])
        self._kept = dict(zip(map(int, state["prompts"]), kept, strict=True))
        self._reference = {int(prompt): (float(log_z), int(n)) for prompt, (log_z, n) in state["reference"]}
        self.coverage = float(state["coverage"])


def _log_mean(x: Tensor, dim: int) -> Tensor:
    return torch.logsumexp(x.double(), dim) - math.log(x.shape[dim])


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
