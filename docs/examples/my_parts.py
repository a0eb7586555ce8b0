"""Parts of one's own: an f, a target, a verifiable reward and an estimator; `my_parts.yaml` takes them by dotted path."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlhf_fdiv.divergences import Divergence
from rlhf_fdiv.estimators import Reinforce


@dataclass(frozen=True)
class LeCam(Divergence):
    """Σ (π − p)²/(π + p), the triangular discrimination: f(t) = (t − 1)²/(t + 1), with (t − 1)/(t + 1) = tanh(s/2)."""

    name: ClassVar[str] = "le_cam"
    f_prime_at_infinity: ClassVar[float] = 1.0

    def f(self, s: Tensor) -> Tensor:
        return torch.expm1(s) * torch.tanh(s / 2)

    def f_prime(self, s: Tensor) -> Tensor:
        return torch.tanh(s / 2) * (2 - torch.tanh(s / 2))


@dataclass(frozen=True)
class CappedTilt:
    """p ∝ a·exp(min(r, cap)/β): a reward above `cap` buys nothing more."""

    reward: str = "reward"
    beta: float = 0.1
    cap: float = 1.0
    has_zeros: ClassVar[bool] = False

    @property
    def scorers(self) -> tuple[str, ...]:
        return (self.reward,)

    def potential(self, scores: dict[str, Tensor]) -> Tensor:
        return scores[self.reward].clamp(max=self.cap) / self.beta


def adds_up(prompts: list[str], completions: list[str], answer: list[int], **columns: list) -> list[float]:
    """1 where the letters of a completion, a to d for 1 to 4, add up to the `answer` of its prompt's row, else 0."""
    sums = [sum("abcd".index(c) + 1 for c in text if c in "abcd") for text in completions]
    return [float(found == wanted) for found, wanted in zip(sums, answer, strict=True)]


@dataclass(frozen=True)
class LeaveOneOutOfBatch(Reinforce):
    """The baseline of a completion is the mean score of all others of the batch, not of its prompt alone."""

    min_generations: ClassVar[int] = 1

    def advantage(self, scores: Tensor, weights: Tensor) -> Tensor:
        weighted = weights * scores
        return weighted - weights * (weighted.sum() - weighted) / (weighted.numel() - 1)
