"""What a policy step reports: the objective first, never the reward alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor

from rlhf_fdiv import divergences
from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.estimators import importance_weights
from rlhf_fdiv.objectives import log_target
from rlhf_fdiv.rollout import Rollout
from rlhf_fdiv.sequences import sequence_sum
from rlhf_fdiv.targets import effective_sample_size
from rlhf_fdiv.tracking import Metrics

SHOWN = ("objective", "kl_reference", "divergence_target", "ess_log_z", "entropy")


class Log:
    """Metrics, completions and the line on the screen; gathers from every process, writes on one."""

    def __init__(self, config: RunConfig, out: Path, resume_step: int, writes: bool, eos_token_id: int) -> None:
        self.config, self.out, self.writes, self.eos_token_id = config, out, writes, eos_token_id
        self.metrics = Metrics(out, config.report_to, resume_step) if writes else None
        self.console = Console(quiet=not writes, highlight=False)
        self.completions: list[dict[str, Any]] = []
        self.first_objective: float | None = None
        self.seconds = 0.0

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
        accelerator: Accelerator,
    ) -> None:
        """Means over all processes of the completions that the policy drew in one step, measured with that policy."""
        mask, k = batch.sequences.mask, self.config.policy.num_generations
        log_pi, log_ref = sequence_sum(batch.log_probs, mask), sequence_sum(log_a, mask)
        entropy, lengths = sequence_sum(batch.entropy, mask), mask.sum(-1).float()
        finished = batch.finished(self.eos_token_id).float()
        own = torch.ones_like(log_pi) if batch.own is None else batch.own.to(log_pi)
        columns = [log_pi, log_ref, potential, log_z, entropy, lengths, finished, batch.log_mu, own, *scores.values()]
        whole = accelerator.gather(torch.stack(columns, 1).contiguous())
        log_pi, log_ref, potential, log_z, _, _, _, log_mu, own, *_ = whole.unbind(1)
        log_p = log_target(log_ref, potential, log_z)
        ess = effective_sample_size((log_p - log_mu).view(-1, k))
        if batch.own is not None:
            weights = importance_weights(log_pi, log_mu, self.config.policy.max_importance_weight)
            figures["ess_importance"] = float(effective_sample_size(weights.log()))
            figures["clipped_importance"] = float((weights >= self.config.policy.max_importance_weight).float().mean())
        drawn = own.bool()
        measured = divergences.estimate(
            self.config.f, log_pi[drawn], log_p[drawn], (torch.arange(len(whole)) // k)[drawn.cpu()]
        )
        log_pi, log_ref, potential, log_z, entropy, lengths, finished, _, _, *score_columns = whole[drawn].unbind(1)
        kl = float((log_pi - log_ref).mean())
        values = {
            "objective": self.config.beta * (float(potential.mean()) - kl),
            **{name: float(column.mean()) for name, column in zip(scores, score_columns, strict=True)},
            "kl_reference": kl,
            "divergence_target": measured.value,
            "log_z": float(log_z.mean()),
            "ess_log_z": float(ess.mean()),
            "out_of_support": float((potential == -math.inf).float().mean()),
            "entropy": float(entropy.sum() / lengths.sum()),
            "length": float(lengths.mean()),
            "finished": float(finished.mean()),
            **figures,
            "tokens": float(lengths.sum()),
            "seconds": seconds,
        }
        rows = [
            {"step": step, **{c: v[i] for c, v in texts.items()}, **{n: float(s[i]) for n, s in scores.items()}}
            for i in range(len(potential) // accelerator.num_processes)
        ]
        self.completions += gather_object(rows)
        if self.metrics is not None:
            self.metrics.log(step, values)
            self._show(step, values)

    def _show(self, step: int, values: dict[str, float]) -> None:
        rewards = [n for n in self.config.target.scorers if n in values]
        shown = [f"{n} {values[n]:.3g}" for n in (*SHOWN[:1], *rewards, *SHOWN[1:]) if math.isfinite(values[n])]
        self.seconds = values["seconds"] if not self.seconds else 0.9 * self.seconds + 0.1 * values["seconds"]
        left = (self.config.policy.max_steps - step) * self.seconds
        figures = "  ".join(shown)
        self.console.print(
            f"[bold]{step:>5}/{self.config.policy.max_steps}[/]  {figures}  {values['seconds']:.1f} s, "
            f"{left / 60:.0f} min left",
            soft_wrap=True,
        )
        if self.first_objective is None:
            self.first_objective = values["objective"]
        if step % 10 == 0 and values["objective"] < self.first_objective - abs(self.first_objective) - 1:
            self.console.print(
                f"      warning: the objective ({values['objective']:.3g}) is below that of the untouched model "
                f"({self.first_objective:.3g}) while training goes on: a lower learning rate usually mends this"
            )

    def flush_completions(self, step: int) -> None:
        """One Parquet file for the completions since the last checkpoint."""
        if self.writes and self.completions:
            import pandas as pd

            folder = self.out / "completions"
            folder.mkdir(exist_ok=True)
            pd.DataFrame(self.completions).to_parquet(folder / f"until-{step:06d}.parquet")
        self.completions = []

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
