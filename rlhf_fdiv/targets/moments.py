"""Distributional constraints E_p[φ] = μ̄ (GDC, arXiv 2012.11635): p ∝ a·exp(λ·φ), with λ from a convex dual."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rlhf_fdiv.ranges import Count, NotNegative, Number
from rlhf_fdiv.targets.partition import effective_sample_size
from rlhf_fdiv.targets.potentials import Product


@dataclass(frozen=True)
class Moments:
    """potential = λ·φ(x, y): the target nearest to a (in KL(p‖a)) whose moments are `moments`, a scorer → its mean.

    λ is solved before training on `num_prompts` × `num_generations` samples of the reference, one λ for all prompts and
    a Z for each prompt. With `dual_learning_rate` > 0 it then follows the trained policy (`DualAscent`).
    """

    moments: dict[str, Number]
    num_prompts: Count = 32
    num_generations: Count = 64
    lambdas: dict[str, Number] = field(default_factory=dict)
    dual_learning_rate: NotNegative = 0.0
    name: ClassVar[str] = "moments"
    has_zeros: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.moments:
            raise ValueError("moments: needs at least one scorer with its mean")
        if self.lambdas and self.lambdas.keys() != self.moments.keys():
            raise ValueError(f"lambdas: must have the keys of target.moments: {', '.join(self.moments)}")

    @property
    def scorers(self) -> tuple[str, ...]:
        return tuple(self.moments)

    def potential(self, scores: dict[str, Tensor]) -> Tensor:
        if not self.lambdas:
            raise ValueError("moments: λ is not solved yet")
        return sum((self.lambdas[k] * scores[k] for k in self.moments), torch.zeros(()))


class MomentSolution(NamedTuple):
    """λ [k]; reference and reached moments [k]; log Z(x) [P]; the ESS of all prompts together and the largest residual;
    the bias that was taken off λ, [k], nan where it is not known."""

    lambdas: Tensor
    reference: Tensor
    reached: Tensor
    log_z: Tensor
    ess: float
    residual: float
    bias: Tensor


def solve_moments(
    phi: Tensor, goal: Tensor, names: list[str], base: Tensor | None = None, tolerance: float = 1e-9
) -> MomentSolution:
    """Newton's method on the convex dual mean_x log Z(x, λ) − λ·μ̄, from samples of the reference.

    phi [P, K, k] are the features of K samples for each of P prompts, goal [k]; a pooled Z would be wrong (base rates
    .02 and .5 with the goal .5 would reach .397). `base` [P, K] is the potential of what the target is multiplied with.
    Raises ValueError, naming the reachable range, for a goal outside it.
    """
    phi, goal = phi.double(), goal.double()
    base = torch.zeros_like(phi[..., 0]) if base is None else base.double()
    if not phi.isfinite().all():
        raise ValueError("moments: a feature is nan or infinite")
    _check_reachable(phi, goal, names, base)
    plain_phi, centre, scale = phi, phi.mean((0, 1)), phi.std((0, 1))
    phi, goal = (phi - centre) / scale, (goal - centre) / scale  # so that ridge and tolerance suit every feature
    lambdas = torch.zeros_like(goal)
    for _ in range(200):
        weights = torch.softmax(base + phi @ lambdas, 1)  # [P, K]
        mean = torch.einsum("pk,pki->pi", weights, phi)
        gradient = mean.mean(0) - goal
        if gradient.abs().max() < tolerance:
            break
        centred = phi - mean[:, None]
        hessian = torch.einsum("pk,pki,pkj->ij", weights, centred, centred) / len(phi)
        ridge = 1e-10 + 1e-8 * hessian.diagonal().mean()
        step = torch.linalg.solve(hessian + ridge * torch.eye(len(goal), dtype=phi.dtype), gradient)
        lambdas = _line_search(phi, base, goal, lambdas, step, gradient)
    else:
        reached = (x * scale + centre for x in (goal, mean.mean(0)))
        unmet = ", ".join(f"{n} = {g:.3g} (reached {m:.3g})" for n, g, m in zip(names, *reached, strict=True))
        raise ValueError(f"moments: no finite λ meets these together: {unmet}. Move the goals nearer to what a samples")
    lambdas = lambdas / scale
    log_weights = base + plain_phi @ lambdas
    return MomentSolution(
        lambdas,
        torch.einsum("pk,pki->i", torch.softmax(base, 1), plain_phi) / len(phi),
        mean.mean(0) * scale + centre,
        torch.logsumexp(log_weights, 1) - math.log(phi.shape[1]),
        float(effective_sample_size(log_weights).sum()),
        float((gradient * scale).abs().max()),
        torch.full_like(lambdas, math.nan),
    )


def extrapolated(
    solution: MomentSolution, phi: Tensor, goal: Tensor, names: list[str], base: Tensor | None = None
) -> MomentSolution:
    """λ without the first-order bias of K samples a prompt: 2·λ_K − λ_{K/2}, λ_{K/2} the mean over the two halves.

    Each prompt's self-normalised moment is biased by about 1/K, which drives λ away from 0: at a base rate of 7 %, K = 16
    would solve for a goal of .5 with a λ that truly gives .69. `reached` and `residual` stay those of λ_K on its samples.
    Left as it is, with `bias` nan, where a half cannot reach the goal.
    """
    k = phi.shape[1] // 2
    halves = [(phi[:, part], None if base is None else base[:, part]) for part in (slice(k), slice(k, 2 * k))]
    try:
        half = torch.stack([solve_moments(x, goal, names, b).lambdas for x, b in halves]).mean(0)
    except ValueError:
        return solution
    bias = half - solution.lambdas
    log_weights = (0.0 if base is None else base.double()) + phi.double() @ (solution.lambdas - bias)
    log_z = torch.logsumexp(log_weights, 1) - math.log(phi.shape[1])
    ess = float(effective_sample_size(log_weights).sum())
    return solution._replace(lambdas=solution.lambdas - bias, log_z=log_z, ess=ess, bias=bias)


def _dual(phi: Tensor, base: Tensor, goal: Tensor, lambdas: Tensor) -> Tensor:
    return torch.logsumexp(base + phi @ lambdas, 1).mean() - lambdas @ goal


def _line_search(phi: Tensor, base: Tensor, goal: Tensor, lambdas: Tensor, step: Tensor, gradient: Tensor) -> Tensor:
    size, start = 1.0, _dual(phi, base, goal, lambdas)
    while size > 1e-10 and _dual(phi, base, goal, lambdas - size * step) > start - 1e-4 * size * (gradient @ step):
        size /= 2
    return lambdas - size * step


def _check_reachable(phi: Tensor, goal: Tensor, names: list[str], base: Tensor) -> None:
    out = base == -math.inf  # outside the support of what the target is multiplied with
    if bool(out.all(1).any()):
        raise ValueError(
            f"moments: for {int(out.all(1).sum())} of {len(phi)} prompts no sample of the reference lies in the support of "
            "the rest of the product. Raise num_generations, or give the pointwise part a `floor`"
        )
    # with one λ for all prompts and λ → ±∞, each prompt moves to its own extreme sample
    low = phi.masked_fill(out[..., None], math.inf).amin(1).mean(0)
    high = phi.masked_fill(out[..., None], -math.inf).amax(1).mean(0)
    problems = [
        f"{name} = {float(g):g} is outside the reachable range ({float(lo):.3g}, {float(hi):.3g})"
        for name, g, lo, hi in zip(names, goal, low, high, strict=True)
        if not lo < g < hi
    ]
    if problems:
        raise ValueError(
            f"moments: {'; '.join(problems)} of {phi.shape[1]} samples of the reference for each of {len(phi)} prompts. "
            "Choose goals inside, or raise num_generations so that rare texts are seen"
        )


def moments_of(target: Any) -> Moments | None:
    """The `moments` part of a target."""
    return next((t for t in getattr(target, "of", [target]) if isinstance(t, Moments)), None)


def with_lambdas(target: Any, lambdas: dict[str, float]) -> Any:
    """The target with the λ of its `moments` part set."""
    if isinstance(target, Product):
        return replace(target, of=[with_lambdas(t, lambdas) for t in target.of])
    return replace(target, lambdas=lambdas) if isinstance(target, Moments) else target


class DualAscent:
    """λ ← λ + η·(μ̄ − E_π[φ]) / E_π[(φ − μ̄)²] after each step, η the target's `dual_learning_rate` under the policy's own
    schedule, so that both come to rest together.

    A policy that can represent p ends where it would without: E_π[φ] = E_p[φ] = μ̄ at the λ of the convex dual. One that
    cannot falls short of the moments of the p that it is trained towards; λ then moves on until the policy's own meet the
    goal. For reverse KL that is gradient ascent on the multiplier of min KL(π‖a) subject to E_π[φ] = μ̄. The divisor,
    averaged over all steps, makes η free of the unit of φ.
    """

    def __init__(self, target: Any) -> None:
        self.target = target
        found = moments_of(target) or Moments({"": 0.0})
        self.rate, self.goal, self.lambdas = found.dual_learning_rate, found.moments, dict(found.lambdas)
        self._spread, self._steps = dict.fromkeys(self.goal, 0.0), 0

    def step(self, scores: dict[str, Tensor], schedule: float = 1.0) -> dict[str, float]:
        """Takes the scores of completions that the policy drew, [N] each, and the share of η that the schedule gives;
        returns each `lambda_…` from now on."""
        if not self.rate:
            return {}
        distances = {name: goal - scores[name].double() for name, goal in self.goal.items()}
        if any(len(x) == 0 for x in distances.values()):  # the reference drew all of them
            distances = {}
        self._steps += bool(distances)
        for name, distance in distances.items():
            self._spread[name] += (float((distance**2).mean()) - self._spread[name]) / self._steps
            if self._spread[name]:
                self.lambdas[name] += schedule * self.rate * float(distance.mean()) / self._spread[name]
        self.target = with_lambdas(self.target, dict(self.lambdas))
        return {f"lambda_{name}": value for name, value in self.lambdas.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"lambdas": self.lambdas, "spread": self._spread, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lambdas, self._spread, self._steps = dict(state["lambdas"]), dict(state["spread"]), state["steps"]
        if self.rate:
            self.target = with_lambdas(self.target, dict(self.lambdas))
