"""What is optimised, as pure functions of log-probabilities. The four objectives coincide for no f but reverse KL.

Online, each is one policy gradient E_π[score(y)·∇log π(y)] with a score of its own (`pseudo_reward`):

    match        min D_f(π‖p)              score = −f'(log π − log p)          f-DPG, GDC, KL-DPG; arXiv 2302.08215
    regularise   max E_π[r] − β·D_f(π‖a)   score = r − β·f'(log π − log a)     KL-regularised RLHF and PPO are reverse KL
    prefer       −log σ(β[f'(u_w) − f'(u_l)]), u = π/a, offline                f-DPO; arXiv 2309.16240

with log p = log a + potential − log Z(x) and, where a target is configured, r = β·potential.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fdiv.divergences import Divergence, exact, label
from rlhf_fdiv.ranges import Positive
from rlhf_fdiv.sequences import at_last_token, sequence_sum


def log_target(log_a: Tensor, potential: Tensor, log_z: Tensor) -> Tensor:
    """log p = log a + potential − log Z, −inf where the target is zero, also for a prompt whose Ẑ is still zero."""
    return torch.where(potential == -math.inf, -math.inf, log_a + potential - log_z)


@dataclass(frozen=True)
class Match:
    """min D_f(π‖p) for a fixed target p."""

    name: ClassVar[str] = "match"

    def pseudo_reward(self, f: Divergence, log_pi: Tensor, log_a: Tensor, potential: Tensor, log_z: Tensor) -> Tensor:
        """−f'(log π − log p), [B] each; where p = 0 it is −f'(∞), which `conflicts` requires to be finite."""
        return -f.f_prime(log_pi - log_target(log_a, potential, log_z))

    def conflicts(self, f: Divergence, target_has_zeros: bool) -> str | None:
        if target_has_zeros and math.isinf(f.f_prime_at_infinity):
            return (
                f"{label(f)} is infinite where the target is zero (f'(∞) = ∞): with a pointwise target use an f of "
                "finite f'(∞), such as forward_kl, js, tv, hellinger or alpha < 1, or bound the target below by `floor`"
            )
        return None


@dataclass(frozen=True)
class Regularise:
    """max E_π[r] − β·D_f(π‖a); its optimum is a·[(f')⁻¹((r − λ(x))/β)]₊, a tilt a·exp(r/β) for reverse KL only."""

    beta: Positive = 0.1
    name: ClassVar[str] = "regularise"

    def pseudo_reward(self, f: Divergence, log_pi: Tensor, log_a: Tensor, potential: Tensor, log_z: Tensor) -> Tensor:
        """r − β·f'(log π − log a) with r = β·potential, [B] each."""
        return self.beta * (potential - f.f_prime(log_pi - log_a))

    def conflicts(self, f: Divergence, target_has_zeros: bool) -> str | None:
        if target_has_zeros:
            return (
                "regularise needs a finite reward, and this target's potential is −inf where it is zero: "
                "use objective match, or bound the target below by `floor`"
            )
        return None


@dataclass(frozen=True)
class Prefer:
    """f-DPO from pairs, offline; needs a strictly convex f with f'(0⁺) = −∞."""

    beta: Positive = 0.1
    name: ClassVar[str] = "prefer"

    def conflicts(self, f: Divergence, target_has_zeros: bool = False) -> str | None:
        slope_at_zero = float(f.f_prime(torch.tensor(-math.inf, dtype=torch.float64)))
        if slope_at_zero != -math.inf:
            return (
                f"{label(f)} cannot be used by prefer: f'(0⁺) = {slope_at_zero:.3g}, and f-DPO is valid only where it is "
                "−∞ (forward_kl, reverse_kl, js, jeffreys, alpha ≤ 1, chi_mix — the repaired Pearson)"
            )
        return None


OBJECTIVES: dict[str, Any] = {cls.name: cls for cls in (Match, Regularise, Prefer)}


def chain_rule_factor(f: Divergence) -> float | None:
    """c where f'(t) = c·ln t. Reverse KL alone (up to scale) is a sum over tokens; every other f is one number a text."""
    s = torch.tensor([-7.0, -0.3, 2.0, 11.0], dtype=torch.float64)
    slopes = f.f_prime(s) / s
    return float(slopes[0]) if bool(torch.allclose(slopes, slopes[:1].expand(4), rtol=1e-9, atol=0)) else None


def token_rewards(
    objective: Match | Regularise,
    f: Divergence,
    log_pi: Tensor,
    log_a: Tensor,
    mask: Tensor,
    potential: Tensor,
    log_z: Tensor,
) -> Tensor:
    """The pseudo-reward laid out over tokens, [B, T], summing to it exactly; log π and log a by token, [B, T].

    For reverse KL each token pays its own log-ratio and the last one receives the rest (PPO's usual form). For any other
    f the whole score is paid at the last token: a per-token f-penalty would be another objective.
    """
    score = objective.pseudo_reward(f, sequence_sum(log_pi, mask), sequence_sum(log_a, mask), potential, log_z)
    factor = chain_rule_factor(f)
    if factor is None:
        return at_last_token(score, mask)
    scale = factor * (objective.beta if isinstance(objective, Regularise) else 1.0)
    penalty = -scale * (log_pi - log_a) * mask
    return penalty + at_last_token(score - penalty.sum(-1), mask)


def next_token_divergence(f: Divergence, log_prob: Tensor) -> Tensor:
    """SFT by token: D_f(π ‖ δ_y) = f(π_y) + f'(∞)·(1 − π_y), the data's next token y as the target; any shape.

    Forward KL gives −log π_y, the cross-entropy; alpha and hellinger give the generalised cross-entropy
    (1 − π_y^q)/q up to scale (arXiv 1805.07836), tv gives 1 − π_y. Needs a finite f'(∞).
    """
    if math.isinf(f.f_prime_at_infinity):
        raise ValueError(f"{label(f)} is infinite for any model that is not certain (f'(∞) = ∞)")
    return f.f(log_prob) - f.f_prime_at_infinity * torch.expm1(log_prob)


def preference_divergence(f: Divergence, margin: Tensor, preference: Tensor) -> Tensor:
    """Reward model by pair: Bernoulli D_f(σ(r_A − r_B) ‖ c), c the share of raters who prefer A; any shape.

    Forward KL is Bradley–Terry with soft labels less the labels' own entropy, which no parameter moves.
    """
    log_pi = torch.stack([F.logsigmoid(margin), F.logsigmoid(-margin)], -1)
    log_p = torch.stack([preference.log(), torch.log1p(-preference)], -1)
    return exact(f, log_pi, log_p)
