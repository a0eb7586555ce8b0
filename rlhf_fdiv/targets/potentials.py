"""Potentials that are known before training: a reward tilt, a pointwise constraint, and products.

A target, of the library or of a user, is a frozen dataclass; its fields are its YAML schema. It has

    scorers              the names of the scorers that it reads, a tuple of str
    potential(scores)    log p̃ − log a of each text, from those names' scores, a mapping; all of one shape, [B] or [P, K]
    has_zeros            whether a potential may be −inf; `match` then asks for an f of finite f'(∞), `regularise` refuses
    beta                 if it has one, r = β·potential is the reward of the reported objective E[r] − β·KL
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_fdiv.ranges import BelowOne, Positive


@dataclass(frozen=True)
class Tilted:
    """potential = r/β: the target of RLHF, p ∝ a·exp(r/β)."""

    beta: Positive = 0.1
    reward: str = "reward"
    name: ClassVar[str] = "tilted"
    has_zeros: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"target.beta must be above 0, not {self.beta}")

    @property
    def scorers(self) -> tuple[str, ...]:
        return (self.reward,)

    def potential(self, scores: dict[str, Tensor]) -> Tensor:
        return scores[self.reward] / self.beta


@dataclass(frozen=True)
class Pointwise:
    """potential = log b(x, y), 0 ≤ b ≤ 1: with b ∈ {0, 1} the target is a itself, conditioned on the constraint.

    Where b = 0 the target is exactly zero and only an f of finite f'(∞) can be matched; `floor` > 0 replaces b by
    max(b, floor) for the others.
    """

    scorer: str
    floor: BelowOne = 0.0
    name: ClassVar[str] = "pointwise"

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise ValueError(f"target.floor must lie in [0, 1), not {self.floor}")

    @property
    def has_zeros(self) -> bool:
        return self.floor == 0

    @property
    def scorers(self) -> tuple[str, ...]:
        return (self.scorer,)

    def potential(self, scores: dict[str, Tensor]) -> Tensor:
        b = scores[self.scorer]
        for outside in b[(b < 0) | (b > 1)].tolist():
            raise ValueError(f"pointwise: scorer {self.scorer!r} gave {outside:g}, which is not in [0, 1]")
        return b.clamp(min=self.floor).log()


@dataclass(frozen=True)
class Product:
    """potential = Σ of the potentials of several targets, which makes p ∝ a·Π exp(potential)."""

    of: list[Any] = field(default_factory=list)
    name: ClassVar[str] = "product"

    def __post_init__(self) -> None:
        if not self.of:
            raise ValueError("of: a product needs at least one target")
        flat = [part for t in self.of for part in (t.of if isinstance(t, Product) else [t])]
        if sum(hasattr(part, "lambdas") for part in flat) > 1:
            raise ValueError("of: put all moments of a product into one `moments` target; they share one λ vector")
        object.__setattr__(self, "of", flat)

    @property
    def has_zeros(self) -> bool:
        return any(t.has_zeros for t in self.of)

    @property
    def scorers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for t in self.of for name in t.scorers))

    def potential(self, scores: dict[str, Tensor]) -> Tensor:
        total = sum(target.potential(scores) for target in self.of)
        return torch.where(total.isnan(), -math.inf, total)
