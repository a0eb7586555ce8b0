"""The target p(y|x) ∝ a(y|x)·exp(potential(x, y)). A target names the scorers whose scores its potential is made of.

Each target's fields are its YAML schema. `scores` maps a scorer's name to its scores of the batch, [B].
"""

from __future__ import annotations

from typing import Any

from rlhf_fdiv.targets.moments import Moments, MomentSolution, solve_moments
from rlhf_fdiv.targets.partition import LogPartition, effective_sample_size
from rlhf_fdiv.targets.potentials import Pointwise, Product, Tilted

TARGETS: dict[str, Any] = {cls.name: cls for cls in (Tilted, Moments, Pointwise, Product)}

__all__ = [
    "TARGETS",
    "LogPartition",
    "MomentSolution",
    "Moments",
    "Pointwise",
    "Product",
    "Tilted",
    "effective_sample_size",
    "solve_moments",
]
