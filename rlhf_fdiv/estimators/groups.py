"""Estimators without a critic: one score a completion, a baseline from the other completions of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlhf_fdiv.estimators.loss import Advantages
from rlhf_fdiv.ranges import Count, Positive


@dataclass(frozen=True)
class Reinforce:
    """score·∇log π, no baseline: unbiased, and the most variance (Williams 1992)."""

    num_epochs: ClassVar[int] = 1
    clip_range: ClassVar[float | None] = None
    value_head: ClassVar[bool] = False
    min_generations: ClassVar[int] = 1
    name: ClassVar[str] = "reinforce"

    def __call__(self, rewards: Tensor, mask: Tensor, num_generations: int, values: Tensor | None = None) -> Advantages:
        """Token rewards and mask [B, T], the K completions of a prompt in consecutive rows → advantages [B, T]."""
        return self._spread(rewards.sum(-1), mask)

    def _spread(self, scores: Tensor, mask: Tensor) -> Advantages:
        return Advantages(scores[:, None] * mask)


@dataclass(frozen=True)
class RLOO(Reinforce):
    """Leave-one-out: the baseline is the mean score of the prompt's other K − 1 completions (arXiv 2402.14740). Unbiased;
    any per-prompt constant, log Z(x) in reverse KL among them, drops out."""

    min_generations: ClassVar[int] = 2
    name: ClassVar[str] = "rloo"

    def __call__(self, rewards: Tensor, mask: Tensor, num_generations: int, values: Tensor | None = None) -> Advantages:
        scores = rewards.sum(-1).view(-1, num_generations)
        others = (scores.sum(1, keepdim=True) - scores) / (num_generations - 1)
        return self._spread((scores - others).flatten(), mask)


@dataclass(frozen=True)
class GRPO(Reinforce):
    """(score − group mean)/(group std), clipped ratios, several epochs (arXiv 2402.03300). Biased by design: the mean
    contains the score itself, a factor (K − 1)/K, and the std reweights prompts."""

    scale_rewards: bool = True
    clip_range: Positive | None = 0.2  # type: ignore[misc]
    num_epochs: Count = 1  # type: ignore[misc]
    min_generations: ClassVar[int] = 2
    name: ClassVar[str] = "grpo"

    def __call__(self, rewards: Tensor, mask: Tensor, num_generations: int, values: Tensor | None = None) -> Advantages:
        scores = rewards.sum(-1).view(-1, num_generations)
        centred = scores - scores.mean(1, keepdim=True)
        if self.scale_rewards:
            centred = centred / (scores.std(1, keepdim=True) + 1e-4)
        return self._spread(centred.flatten(), mask)
