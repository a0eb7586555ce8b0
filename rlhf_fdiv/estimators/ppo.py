"""PPO with a value head that shares the policy's body (arXiv 1707.06347; GAE: arXiv 1506.02438)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlhf_fdiv.estimators.loss import Advantages
from rlhf_fdiv.ranges import Count, NotNegative, Positive, Share


@dataclass(frozen=True)
class PPO:
    """Clipped ratios and generalised advantages, several epochs over minibatches of one rollout.

    f' is computed once a rollout, with the policy that sampled it, and frozen over the epochs: later epochs follow the
    gradient of the surrogate, not of D_f at the moving policy. At one epoch, lam = 1, gamma = 1, no whitening and a zero
    value head it is `reinforce`, sample by sample.
    """

    num_epochs: Count = 2
    num_minibatches: Count = 2
    clip_range: Positive | None = 0.2
    gamma: Share = 1.0
    lam: Share = 0.95
    vf_coef: NotNegative = 0.1
    clip_range_value: Positive | None = 0.2
    whiten_advantages: bool = True
    value_head: ClassVar[bool] = True
    min_generations: ClassVar[int] = 1
    name: ClassVar[str] = "ppo"

    def __call__(
        self,
        rewards: Tensor,
        mask: Tensor,
        num_generations: int,
        values: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Advantages:
        """Token rewards, mask and values V(x, y_<t), [B, T] → advantages and returns, [B, T]; `weights` [B] multiply the
        advantages of off-policy samples."""
        if values is None:
            raise ValueError("ppo needs the values of its value head")
        advantages = generalised_advantages(rewards, values, mask, self.gamma, self.lam)
        returns = advantages + values * mask
        advantages = whiten(advantages, mask) if self.whiten_advantages else advantages
        return Advantages(advantages if weights is None else weights[:, None] * advantages, returns)

    def value_loss(self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        """½·vf_coef·Σ_t (V − R)², the larger of clipped and unclipped; [B, T] each → [B]."""
        error = (values - returns) ** 2
        if self.clip_range_value is not None:
            near = old_values + (values - old_values).clamp(-self.clip_range_value, self.clip_range_value)
            error = torch.maximum(error, (near - returns) ** 2)
        return 0.5 * self.vf_coef * (error * mask).sum(-1)


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = Σ_l (γλ)^l·δ_{t+l}, δ_t = r_t + γ·V_{t+1} − V_t, V = 0 after the last token; all [B, T]."""
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas = (rewards + gamma * following - values) * mask
    advantage, out = torch.zeros_like(deltas[:, 0]), []
    for t in reversed(range(deltas.shape[1])):
        advantage = (deltas[:, t] + gamma * lam * advantage) * mask[:, t]
        out.append(advantage)
    return torch.stack(out[::-1], 1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens of the batch; 0 where masked."""
    n = mask.sum()
    mean = (x * mask).sum() / n
    variance = (((x - mean) ** 2) * mask).sum() / n
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V)/Var(R) over tokens: 0 for a useless critic, 1 for a perfect one; a scalar."""
    keep = mask.bool()
    return 1 - (returns[keep] - values[keep]).var() / returns[keep].var().clamp(min=1e-12)
