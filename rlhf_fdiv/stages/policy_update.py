"""One rollout's optimiser steps: one an epoch for reinforce, rloo and grpo; epochs × minibatches for ppo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fdiv.estimators import importance_weights, policy_loss
from rlhf_fdiv.estimators.loss import out_of_range
from rlhf_fdiv.estimators.ppo import explained_variance
from rlhf_fdiv.models import in_micro_batches
from rlhf_fdiv.rollout import Rollout
from rlhf_fdiv.sequences import sequence_sum
from rlhf_fdiv.stages.training import Mean, Training
from rlhf_fdiv.targets import effective_sample_size


def update(
    training: Training,
    estimator: Any,
    batch: Rollout,
    rewards: Tensor,
    seed: int,
    rescore: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Trains on one rollout, `rewards` [B, T] by token; returns loss, grad_norm and the estimator's own figures.

    Where an estimator without clipping goes over it again, `rescore(log_pi, rows)` gives the rewards of the policy as it
    is by then, and weights π/μ make up for the samples being older: each epoch follows the objective's own gradient.
    """
    options, mask, k = training.options, batch.sequences.mask, training.options.num_generations
    old_values = None
    old_log_probs: Tensor | None = batch.log_probs
    minibatches = min(getattr(estimator, "num_minibatches", 1), len(mask))
    unclipped = estimator.clip_range is None and not estimator.value_head
    scored_anew = unclipped and estimator.num_epochs > 1  # by whole groups, which micro-batches then may not mix
    if estimator.value_head:
        # by the forward that training uses
        before = in_micro_batches(training.policy, batch.sequences, options.per_device_train_batch_size)
        old_log_probs, old_values = before.log_probs, before.values
    elif unclipped or estimator.num_epochs == 1:
        old_log_probs = None  # the ratio is exactly 1, and its gradient that of log π
    # of the completions of all processes together: whitening and figures must not depend on how they are shared out
    whole = [training.gather(x) for x in (rewards, mask, old_values, batch.weights(options.max_importance_weight))]
    all_rewards, all_masks, all_values, all_weights = whole
    estimated = estimator(all_rewards, all_masks, k, all_values, all_weights)
    advantages, returns = (training.own(x, mask) for x in estimated)
    figures: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    if all_weights is not None:
        figures["ess_importance"] = [float(effective_sample_size(all_weights.log()))]
        figures["clipped_importance"] = [float((all_weights >= options.max_importance_weight).float().mean())]
    first = torch.zeros_like(batch.log_probs)
    mismatch, clipped = Mean(training), Mean(training)

    def loss_of(rows: Tensor) -> Tensor:
        sequences = batch.sequences[rows]
        length = sequences.mask.shape[1]
        part: list[Any] = [
            None if x is None else x[rows, :length] for x in (old_log_probs, advantages, old_values, returns)
        ]
        old, advantage, old_value, goal = part
        out = training.policy(sequences)
        now = out.log_probs.detach()
        old = now if old is None else old
        if not figures["loss"]:  # before the first step rounding alone, or an engine's fault, lies between the two
            first[rows, :length] = now
            mismatch.add((now - batch.log_probs[rows, :length]).abs(), sequences.mask)
        elif unclipped and rescore is not None:  # by how much it moved: rollout and update round differently
            log_pi = batch.log_probs[rows, :length] + now - first[rows, :length]
            cap = options.max_importance_weight
            weights = importance_weights(sequence_sum(log_pi, sequences.mask), batch.log_mu[rows], cap)
            advantage = estimator(rescore(log_pi, rows), sequences.mask, k, weights=weights).advantages
        loss = policy_loss(out.log_probs, old, advantage, sequences.mask, estimator.clip_range)
        if estimator.value_head:
            loss = loss + estimator.value_loss(out.values, old_value, goal, sequences.mask)
        if estimator.clip_range is not None:
            clipped.add(out_of_range(now, old, estimator.clip_range), sequences.mask)
        return loss

    generator = torch.Generator().manual_seed(seed)
    for _ in range(estimator.num_epochs):
        order = torch.randperm(len(mask), generator=generator) if minibatches > 1 else torch.arange(len(mask))
        for rows in order.tensor_split(minibatches):
            loss, norm = training.step(rows, loss_of, None if scored_anew else mask.sum(1).cpu())
            figures["loss"].append(loss)
            figures["grad_norm"].append(norm)
    figures["rollout_mismatch"] = [mismatch.of_all()]  # nats a token
    if estimator.clip_range is not None:
        figures["clip_fraction"] = [clipped.of_all()]
    if estimator.value_head:
        figures["explained_variance"] = [float(explained_variance(all_values, estimated.returns, all_masks))]
    return {name: sum(values) / len(values) for name, values in figures.items()}
