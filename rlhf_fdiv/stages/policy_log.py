"""What a policy step reports: the objective first, never the reward alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor

from rlhf_fdiv import divergences
from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.errors import UserError
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
        self.texts: dict[str, list[Any]] = {}
        self.at_step = resume_step

    @contextlib.contextmanager
    def keeping(self, step: int, texts: dict[str, list[Any]]) -> Iterator[None]:
        """Remembers the batch, so that a failure in scoring or update can leave it in the run folder."""
        self.at_step, self.texts = step, texts
        try:
            yield
        except UserError as error:
            raise UserError(*error.problems, self._keep_batch()) from error
        except Exception as error:
            raise UserError(
                f"step {step}: scoring raised {type(error).__name__}: {error}", self._keep_batch()
            ) from error

    def require_finite(self, value: Tensor, what: str) -> None:
        """Stops the run at a nan or infinite value, before it reaches the weights."""
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"step {self.at_step}: the {what} is {float(value.detach())}", self._keep_batch())

    def _keep_batch(self) -> str:
        import pandas as pd

        path = self.out / f"bad_batch-{self.at_step}.parquet"
        pd.DataFrame(self.texts).to_parquet(path)
        return f"The batch is in {path}; no weight was changed by it, and the last checkpoint is intact"

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
        """Means over all processes of one step's completions, measured with the policy that sampled them."""
        mask, k = batch.sequences.mask, self.config.policy.num_generations
        log_pi, log_ref = sequence_sum(batch.log_probs, mask), sequence_sum(log_a, mask)
        entropy, lengths = sequence_sum(batch.entropy, mask), mask.sum(-1).float()
        finished = batch.finished(self.eos_token_id).float()
        columns = torch.stack([log_pi, log_ref, potential, log_z, entropy, lengths, finished, *scores.values()], 1)
        whole = accelerator.gather(columns.contiguous())
        log_pi, log_ref, potential, log_z, entropy, lengths, finished, *score_columns = whole.unbind(1)
        groups = torch.arange(len(whole)) // k
        log_p = log_target(log_ref, potential, log_z)
        measured = divergences.estimate(self.config.f, log_pi, log_p, groups)
        ess = effective_sample_size((log_p - log_pi).view(-1, k))
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
