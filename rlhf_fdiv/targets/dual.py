"""Moments of the trained policy itself: λ follows what the policy does, as the multiplier of its constraint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from rlhf_fdiv.targets.moments import Moments
from rlhf_fdiv.targets.potentials import Product


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
        self._steps += 1
        for name, goal in self.goal.items():
            distance = goal - scores[name].double()
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
