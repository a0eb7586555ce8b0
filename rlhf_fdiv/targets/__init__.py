"""The target p(y|x) ∝ a(y|x)·exp(potential(x, y)). A target names the scorers whose scores its potential is made of.

Each target's fields are its YAML schema. `scores` maps a scorer's name to its scores of the batch, [B].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fdiv.targets.moments import (
    DualAscent,
    Moments,
    MomentSolution,
    extrapolated,
    moments_of,
    solve_moments,
    with_lambdas,
)  # fmt: skip
from rlhf_fdiv.targets.partition import LogPartition, effective_sample_size
from rlhf_fdiv.targets.potentials import Pointwise, Product, Tilted


def solve(target: Any, scores: dict[str, Tensor], extrapolate: bool = False) -> tuple[Any, MomentSolution | None]:
    """The target with its λ, from scores [P, K] of reference samples; a target without an unsolved moment stays as it is.

    `extrapolate` takes the bias of few samples a prompt off λ.
    """
    moments = unsolved(target)
    if moments is None:
        return target, None
    names, others = list(moments.moments), [t for t in getattr(target, "of", ()) if t is not moments]
    base = Product(others).potential(scores) if others else None
    goal = torch.tensor([moments.moments[n] for n in names], dtype=torch.float64)
    phi = torch.stack([scores[n] for n in names], -1)
    solution = solve_moments(phi, goal, names, base)
    if extrapolate:
        solution = extrapolated(solution, phi, goal, names, base)
    return with_lambdas(target, dict(zip(names, solution.lambdas.tolist(), strict=True))), solution


def unsolved(target: Any) -> Moments | None:
    """The `moments` part whose λ is still to be solved."""
    moments = moments_of(target)
    return moments if moments and not moments.lambdas else None


TARGETS: dict[str, Any] = {cls.name: cls for cls in (Tilted, Moments, Pointwise, Product)}

__all__ = [
    "TARGETS", "DualAscent", "LogPartition", "MomentSolution", "Moments", "Pointwise", "Product", "Tilted",
    "effective_sample_size", "extrapolated", "solve", "solve_moments", "unsolved", "with_lambdas",
]  # fmt: skip
