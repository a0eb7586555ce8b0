"""Divergences of a trained policy to its reference and to its target, with honest intervals."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fdiv import divergences
from rlhf_fdiv.divergences import Divergence, clustered_error
from rlhf_fdiv.targets import effective_sample_size


class Measured(NamedTuple):
    """log Ẑ(x) by prompt [P], the mean ESS of a prompt's weights, and the bias that Ẑ's noise puts on log Ẑ."""

    log_z: Tensor
    ess: float
    bias: float


def log_partition_of(log_target: Tensor, log_pi: Tensor, log_a: Tensor) -> Measured:
    """log Z(x) from a prompt's samples, the first half of each row drawn from a, the second from π; [P, 2K] each.

    Weights p̃/(½a + ½π) (balance heuristic): bounded wherever either distribution covers the target.
    """
    log_weights = log_target - torch.logaddexp(log_a, log_pi) + math.log(2)
    n = log_weights.shape[1]
    ess = effective_sample_size(log_weights.double())
    relative_variance = (1 / ess.clamp(min=1) - 1 / n).clamp(min=0)  # of Ẑ; log Ẑ is low by about half of it
    return Measured(
        torch.logsumexp(log_weights, 1) - math.log(n), float(ess.mean()), float(relative_variance.mean() / 2)
    )


def measure_all(
    fs: list[Divergence], log_pi: Tensor, log_p: Tensor, groups: Tensor, bias: float = 0.0
) -> dict[str, dict[str, Any]]:
    """D_f(π‖p) for each f from samples of π, [N] each: value and standard error, or the reason why it is not measurable."""
    table: dict[str, dict[str, Any]] = {}
    for f in fs:
        measured = divergences.estimate(f, log_pi, log_p, groups)
        (value, error, ess), reason = measured, measured.reason
        if not reason and bias > max(error, 0.02):
            value = error = math.nan
            reason = f"not measurable: log Ẑ is biased by about {bias:.2g}, more than the error"
        table[divergences.label(f)] = {"value": value, "standard_error": error, "ess": ess, "reason": reason}
    return table


def paired_difference(after: Tensor, before: Tensor, groups: Tensor) -> tuple[float, float]:
    """Mean of after − before over samples paired by prompt and random stream, [N] each, and its clustered error; without
    the pairs that have nan, a score that does not apply."""
    difference = (after - before).double()
    both = ~difference.isnan()
    return float(difference[both].mean()), clustered_error(difference[both], groups[both])
