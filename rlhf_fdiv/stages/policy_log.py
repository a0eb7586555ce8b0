"""What a policy step reports: the objective first, never the reward alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rlhf_fdiv import divergences
from rlhf_fdiv.chat import shown
from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.objectives import log_target
from rlhf_fdiv.rollout import Rollout
from rlhf_fdiv.sequences import sequence_sum
from rlhf_fdiv.stages.training import Training
from rlhf_fdiv.targets import effective_sample_size
from rlhf_fdiv.tracking import write_table

SHOWN = ("objective", "kl_reference", "divergence_target", "ess_log_z", "entropy")


class Log:
    """The figures and completions of a policy step, gathered from every process."""

    def __init__(self, config: RunConfig, training: Training, stops: list[int]) -> None:
        self.config, self.training, self.stops = config, training, stops
        fs = [config.f, *config.measured]
        self.measured = {divergences.label(f): f for f in fs}
        self.completions: list[dict[str, Any]] = []
        self.first_objective: float | None = None

    def step(
        self,
        step: int,
        batch: Rollout,
        texts: dict[str, list[Any]],
        scores: dict[str, Tensor],
        potential: Tensor,
        log_a: Tensor,
        log_z: Tensor,
        figures: dict[str, float],
        seconds: float,
    ) -> None:
        """Means over all processes of the completions that the policy drew in one step, measured with that policy."""
        accelerator = self.training.accelerator
        mask, k = batch.sequences.mask, self.config.policy.num_generations
        log_pi, log_ref = sequence_sum(batch.log_probs, mask), sequence_sum(log_a, mask)
        entropy, lengths = sequence_sum(batch.entropy, mask), mask.sum(-1).float()
        finished = batch.finished(self.stops).float()
        columns = [log_pi, log_ref, potential, log_z, entropy, lengths, finished, batch.log_mu, batch.drawn]
        whole = accelerator.gather(torch.stack([*columns, *scores.values()], 1).contiguous())
        log_pi, log_ref, potential, log_z, _, _, _, log_mu, own, *_ = whole.unbind(1)
        log_p = log_target(log_ref, potential, log_z)
        ess = effective_sample_size((log_p - log_mu).view(-1, k))
        drawn = own.bool()
        groups = (torch.arange(len(whole)) // k)[drawn.cpu()]
        to_target = self._divergences(log_pi[drawn], log_p[drawn], groups)
        log_pi, log_ref, potential, log_z, entropy, lengths, finished, _, _, *score_columns = whole[drawn].unbind(1)
        kl = float((log_pi - log_ref).mean())
        values = {
            "objective": self.config.beta * (float(potential.mean()) - kl),
            **{name: float(column.nanmean()) for name, column in zip(scores, score_columns, strict=True)},
            "kl_reference": kl,
            "divergence_target": next(iter(to_target.values())),  # of the run's own f
            "log_z": float(log_z.mean()),
            "ess_log_z": float(ess.mean()),
            "out_of_support": float((potential == -math.inf).float().mean()),
            "entropy": float(entropy.sum() / lengths.sum()),
            "length": float(lengths.mean()),
            "finished": float(finished.mean()),
            **figures,
            **{f"to_target.{name}": value for name, value in to_target.items()},
            "tokens": float(lengths.sum()),
        }
        # a column of the data does not give way to a figure of its name, nor hide it
        data = {f"data.{name}" if name in {"step", *scores} else name: column for name, column in texts.items()}
        rows = [
            {"step": step, **{c: shown(v[i]) if c == "prompts" else v[i] for c, v in data.items()}}
            | {n: float(s[i]) for n, s in scores.items()}
            for i in batch.drawn.nonzero().squeeze(1).tolist()
        ]
        self.completions += gather_object(rows)
        self.training.log(step, values, seconds, (SHOWN[0], *self.config.target.scorers, *SHOWN[1:]))
        if self.first_objective is None:
            self.first_objective = values["objective"]
        if step % 10 == 0 and values["objective"] < self.first_objective - abs(self.first_objective) - 1:
            accelerator.print(
                f"      warning: the objective ({values['objective']:.3g}) is below that of the untouched model "
                f"({self.first_objective:.3g}) while training goes on: a lower learning rate usually mends this"
            )

    def _divergences(self, log_pi: Tensor, log_p: Tensor, groups: Tensor) -> dict[str, float]:
        """Each measured D to the target, the run's own f first; nan where these completions cannot measure it."""
        if len(groups) < 2:  # of a large reference_share the policy may have drawn none
            return dict.fromkeys(self.measured, math.nan)
        return {name: divergences.estimate(f, log_pi, log_p, groups).value for name, f in self.measured.items()}

    def flush_completions(self, step: int) -> None:
        """One Parquet file, and a table of the tracker, for the completions since the last checkpoint."""
        if self.training.accelerator.is_main_process and self.completions:
            folder = self.training.out / "completions"
            folder.mkdir(exist_ok=True)
            write_table(folder / f"until-{step:06d}.parquet", self.completions)
            self.training.metrics.log_table(step, "completions", self.completions)
        self.completions = []
