"""From token rewards to advantages, and from advantages to a loss. Each estimator's fields are its YAML schema.

Every estimator optimises the same objective; they differ in variance, and grpo and ppo's clip in a stated bias. The
sampling policy's pseudo-rewards are computed once a rollout and frozen over the epochs.
"""

from __future__ import annotations

from typing import Any

from rlhf_fdiv.estimators.groups import GRPO, RLOO, Reinforce
from rlhf_fdiv.estimators.loss import importance_weights, policy_loss
from rlhf_fdiv.estimators.ppo import PPO

ESTIMATORS: dict[str, Any] = {cls.name: cls for cls in (Reinforce, RLOO, GRPO, PPO)}

__all__ = ["ESTIMATORS", "GRPO", "PPO", "RLOO", "Reinforce", "importance_weights", "policy_loss"]
