"""Estimators without a critic: one score a completion, a baseline from the other completions of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlhf_fdiv.estimators.loss import Advantages
from rlhf_fdiv.ranges import Count, Positive


@dataclass(frozen=True)
class Reinforce:
    """score·∇log π, no baseline: unbiased, and the most variance (Williams 1992). Each of `num_epochs` takes the scores anew,
    of the policy as it is by then, and weighs the completions by π/μ."""

    num_epochs: Count = 1
    clip_range: ClassVar[float | None] = None
    value_head: ClassVar[bool] = False
    min_generations: ClassVar[int] = 1
    name: ClassVar[str] = "reinforce"

    def __call__(
        self,
        rewards: Tensor,
        mask: Tensor,
        num_generations: int,
        values: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Advantages:
        """Token rewards and mask [B, T], the K completions of a prompt in consecutive rows → advantages [B, T].

        `weights` [B] are the importance weights of off-policy samples, None on policy.
        """
        weights = torch.ones_like(rewards[:, 0]) if weights is None else weights
        groups = (x.view(-1, num_generations) for x in (rewards.sum(-1), weights))
        return Advantages(self.advantage(*groups).flatten()[:, None] * mask)

    def advantage(self, scores: Tensor, weights: Tensor) -> Tensor:
        """What multiplies ∇log π of each completion; pseudo-rewards and weights by group, [P, K] each → [P, K]."""
        return weights * scores


@dataclass(frozen=True)
class RLOO(Reinforce):
    """Leave-one-out: the baseline is the mean score of the prompt's other K − 1 completions (arXiv 2402.14740). Unbiased;
    any per-prompt constant, log Z(x) in reverse KL among them, drops out."""

    min_generations: ClassVar[int] = 2
    name: ClassVar[str] = "rloo"

    def advantage(self, scores: Tensor, weights: Tensor) -> Tensor:
        weighted = weights * scores
        others = (weighted.sum(1, keepdim=True) - weighted) / (scores.shape[1] - 1)
        return weighted - weights * others


@dataclass(frozen=True)
class GRPO(Reinforce):
    """(score − group mean)/(group std), clipped ratios, several epochs (arXiv 2402.03300). Biased by design: the mean
    contains the score itself, a factor (K − 1)/K, and the std reweights prompts."""

    scale_rewards: bool = True
    clip_range: Positive | None = 0.2  # type: ignore[misc]
    min_generations: ClassVar[int] = 2
    name: ClassVar[str] = "grpo"

    def advantage(self, scores: Tensor, weights: Tensor) -> Tensor:
        centred = scores - (weights * scores).mean(1, keepdim=True)
        if self.scale_rewards:
            centred = centred / (scores.std(1, keepdim=True) + 1e-4)
        return weights * centred
