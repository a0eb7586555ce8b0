"""The target p(y|x) ∝ a(y|x)·exp(potential(x, y)). A target names the scorers whose scores its potential is made of.

Each target's fields are its YAML schema. `scores` maps a scorer's name to its scores of the batch, [B].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fdiv.targets.dual import DualAscent, with_lambdas
from rlhf_fdiv.targets.moments import Moments, MomentSolution, extrapolated, solve_moments
from rlhf_fdiv.targets.partition import LogPartition, effective_sample_size
from rlhf_fdiv.targets.potentials import Pointwise, Product, Tilted


def solve(target: Any, scores: dict[str, Tensor], extrapolate: bool = False) -> tuple[Any, MomentSolution | None]:
    """The target with its λ, from scores [P, K] of reference samples; a target without an unsolved moment stays as it is.

    `extrapolate` takes the bias of few samples a prompt off λ.
    """
    parts = target.of if isinstance(target, Product) else [target]
    open_parts = [t for t in parts if isinstance(t, Moments) and not t.lambdas]
    if not open_parts:
        return target, None
    if len(open_parts) > 1:
        raise ValueError("target: put all moments of a product into one `moments` target; they share one λ vector")
    moments, others = open_parts[0], [t for t in parts if t is not open_parts[0]]
    names = list(moments.moments)
    base = Product(others).potential(scores) if others else None
    goal = torch.tensor([moments.moments[n] for n in names], dtype=torch.float64)
    phi = torch.stack([scores[n] for n in names], -1)
    solution = solve_moments(phi, goal, names, base)
    if extrapolate:
        solution = extrapolated(solution, phi, goal, names, base)
    return with_lambdas(target, dict(zip(names, solution.lambdas.tolist(), strict=True))), solution


def unsolved(target: Any) -> Moments | None:
    """The `moments` part whose λ is still to be solved."""
    parts = target.of if isinstance(target, Product) else [target]
    return next((t for t in parts if isinstance(t, Moments) and not t.lambdas), None)


TARGETS: dict[str, Any] = {cls.name: cls for cls in (Tilted, Moments, Pointwise, Product)}

__all__ = [
    "TARGETS",
    "DualAscent",
    "LogPartition",
    "MomentSolution",
    "Moments",
    "Pointwise",
    "Product",
    "Tilted",
    "effective_sample_size",
    "extrapolated",
    "solve",
    "solve_moments",
    "unsolved",
    "with_lambdas",
]
