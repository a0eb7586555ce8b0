"""One rollout's optimiser steps: one an epoch for reinforce, rloo and grpo; epochs × minibatches for ppo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fdiv.estimators import explained_variance, importance_weights, out_of_range, policy_loss, prefix_values
from rlhf_fdiv.models import in_micro_batches
from rlhf_fdiv.rollout import Rollout
from rlhf_fdiv.sequences import sequence_sum
from rlhf_fdiv.stages.training import Mean, Training
from rlhf_fdiv.targets import effective_sample_size

Rescore = Callable[[Tensor, Tensor], Tensor]


def update(
    training: Training,
    estimator: Any,
    batch: Rollout,
    rewards: Tensor,
    seed: int,
    rescore: Rescore | None = None,
    prefix_scores: Tensor | None = None,
) -> dict[str, float]:
    """Trains on one rollout, `rewards` [B, T] by token; returns loss, grad_norm and the estimator's own figures. A critic of
    prefixes takes `prefix_scores` [B, T, S].

    Where an estimator without clipping goes over it again, `rescore(log_pi, rows)` gives the rewards of the policy as it
    is by then, and weights π/μ make up for the samples being older: each epoch follows the objective's own gradient.
    """
    mask = batch.sequences.mask
    loss = Loss(training, estimator, batch, rewards, rescore, prefix_scores)
    minibatches = min(getattr(estimator, "num_minibatches", 1), len(mask))
    # where scores are taken anew it is by whole groups, which micro-batches of like length would mix
    lengths = None if loss.unclipped and estimator.num_epochs > 1 else mask.sum(1).cpu()
    generator, steps = torch.Generator().manual_seed(seed), []
    for _ in range(estimator.num_epochs):
        order = torch.randperm(len(mask), generator=generator) if minibatches > 1 else torch.arange(len(mask))
        for rows in order.tensor_split(minibatches):
            steps.append(training.step(rows, loss, lengths))
            loss.first_step = False
    mean_loss, grad_norm = (sum(values) / len(steps) for values in zip(*steps, strict=True))
    return {"loss": mean_loss, "grad_norm": grad_norm, **loss.figures()}


class Loss:
    """The loss of some rows of a rollout, [b], before an update's first step or between its later ones."""

    def __init__(
        self,
        training: Training,
        estimator: Any,
        batch: Rollout,
        rewards: Tensor,
        rescore: Rescore | None,
        prefix_scores: Tensor | None,
    ) -> None:
        self.policy, self.estimator, self.batch, self.rescore = training.policy, estimator, batch, rescore
        self.k, self.cap = training.options.num_generations, training.options.max_importance_weight
        self.unclipped = estimator.clip_range is None and not estimator.value_head and prefix_scores is None
        mask, self.old_values = batch.sequences.mask, None
        self.old_log_probs: Tensor | None = batch.log_probs
        if estimator.value_head:
            # by the forward that training uses
            before = in_micro_batches(training.policy, batch.sequences, training.options.per_device_train_batch_size)
            self.old_log_probs, self.old_values = before.log_probs, before.values
        elif self.unclipped or estimator.num_epochs * getattr(estimator, "num_minibatches", 1) == 1:
            self.old_log_probs = None  # the ratio is exactly 1, and its gradient that of log π
        # of the completions of all processes together: whitening and figures must not depend on how they are shared out
        places = None
        if (
            prefix_scores is not None
        ):  # of each completion in its own step; replayed ones stand behind this process's new
            new = training.options.num_prompts * self.k // training.accelerator.num_processes
            places = training.accelerator.process_index * new + torch.arange(len(mask), device=mask.device) % new
        parts = (rewards, mask, self.old_values, batch.weights(self.cap), prefix_scores, places)
        rewards, self.all_masks, values, self.all_weights, prefixes, places = (training.gather(x) for x in parts)
        if prefixes is not None:
            values = prefix_values(rewards, self.all_masks, prefixes, self.k, estimator.gamma, places)
        self.all_values = values
        self.estimated = estimator(rewards, self.all_masks, self.k, self.all_values, self.all_weights)
        self.advantages, self.returns = (training.own(x, mask) for x in self.estimated)
        self.first_step, self.first_log_probs = True, torch.zeros_like(batch.log_probs)
        self.mismatch, self.clipped = Mean(training), Mean(training)

    def __call__(self, rows: Tensor) -> Tensor:
        sequences, estimator = self.batch.sequences[rows], self.estimator

        def part(x: Any) -> Any:
            return None if x is None else x[rows, : sequences.mask.shape[1]]

        out, advantage, sampled = self.policy(sequences), part(self.advantages), part(self.batch.log_probs)
        now = out.log_probs.detach()
        if self.first_step:  # until then rounding alone, or an engine's fault, lies between the two
            self.first_log_probs[rows, : now.shape[1]] = now
            self.mismatch.add((now - sampled).abs(), sequences.mask)
        elif self.unclipped and self.rescore is not None:  # by how much it moved: rollout and update round differently
            log_pi = sampled + now - part(self.first_log_probs)
            weights = importance_weights(sequence_sum(log_pi, sequences.mask), self.batch.log_mu[rows], self.cap)
            advantage = estimator(self.rescore(log_pi, rows), sequences.mask, self.k, weights=weights).advantages
        old = now if self.old_log_probs is None else part(self.old_log_probs)
        loss = policy_loss(out.log_probs, old, advantage, sequences.mask, estimator.clip_range)
        if estimator.value_head:
            loss = loss + estimator.value_loss(out.values, part(self.old_values), part(self.returns), sequences.mask)
        if estimator.clip_range is not None:
            self.clipped.add(out_of_range(now, old, estimator.clip_range), sequences.mask)
        return loss

    def figures(self) -> dict[str, float]:
        """Of all processes, asked by all of them together after the last step."""
        figures = {"rollout_mismatch": self.mismatch.of_all()}  # nats a token
        if self.all_weights is not None:
            figures["ess_importance"] = float(effective_sample_size(self.all_weights.log()))
            figures["clipped_importance"] = float((self.all_weights >= self.cap).float().mean())
        if self.estimator.clip_range is not None:
            figures["clip_fraction"] = self.clipped.of_all()
        if self.all_values is not None:
            figures["explained_variance"] = float(
                explained_variance(self.all_values, self.estimated.returns, self.all_masks)
            )
        return figures
