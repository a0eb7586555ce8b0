"""Completions of the last steps, trained on again beside the new ones, with importance weights π/μ."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_fdiv.errors import UserError
from rlhf_fdiv.models import in_micro_batches
from rlhf_fdiv.rollout import Rollout
from rlhf_fdiv.sequences import Sequences, pad_to_longest


@dataclass
class Scored:
    """A rollout with log a by token, [B, T], each scorer's score by completion, [B], and where a critic reads them those of
    each token's prefix, [B, T]: all that an update needs of it."""

    batch: Rollout
    log_a: Tensor
    scores: dict[str, Tensor]
    prefix_scores: dict[str, Tensor] = field(default_factory=dict)

    @property
    def by_prefix(self) -> Tensor | None:
        """The scores of prefixes as a critic reads them, [B, T, S]."""
        return torch.stack([*self.prefix_scores.values()], -1) if self.prefix_scores else None

    @classmethod
    def cat(cls, parts: list[Scored]) -> Scored:
        """The rows of several, each weighted by π/μ of the μ that drew it."""
        batches = [part.batch for part in parts]
        batch = Rollout(
            Sequences.cat([b.sequences for b in batches]),
            pad_to_longest([b.log_probs for b in batches], "right"),
            pad_to_longest([b.entropy for b in batches], "right"),
            [row for b in batches for row in b.prompts],
            log_mixture=torch.cat([b.log_mu for b in batches]),
        )
        scores = {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores}
        names = parts[0].prefix_scores
        prefixes = {n: pad_to_longest([part.prefix_scores[n] for part in parts], "right") for n in names}
        return cls(batch, pad_to_longest([part.log_a for part in parts], "right"), scores, prefixes)


class Replay:
    """This process's rollouts of the last `steps` steps, as they were drawn and scored; a part of its checkpoints."""

    def __init__(self, steps: int, accelerator: Any) -> None:
        self.kept: deque[Scored] = deque(maxlen=steps)
        self.accelerator = accelerator
        if steps:
            accelerator.register_save_state_pre_hook(lambda models, weights, folder: self.save(Path(folder)))
            accelerator.register_load_state_pre_hook(lambda models, folder: self.load(Path(folder)))

    def beside(self, new: Scored, policy: Callable[..., Any], size: int) -> Scored:
        """`new`, then what is kept, with log π of the policy as it is now, `size` completions at a time; keeps `new`."""
        older = list(self.kept)
        self.kept.append(replace(new, batch=replace(new.batch, log_mixture=new.batch.log_mu)))
        if not older:
            return new
        parts = [
            replace(x, batch=replace(x.batch, log_probs=in_micro_batches(policy, x.batch.sequences, size).log_probs))
            for x in older
        ]
        return Scored.cat([new, *parts])

    def save(self, folder: Path) -> None:
        for i, x in enumerate(self.kept):
            columns = {**vars(x.batch.sequences), "log_a": x.log_a, "prompts": torch.tensor(x.batch.prompts)}
            columns |= {name: getattr(x.batch, name) for name in ("log_probs", "entropy", "log_mixture")}
            columns |= {f"score.{name}": score for name, score in x.scores.items()}
            columns |= {f"prefix.{name}": score for name, score in x.prefix_scores.items()}
            path = folder / f"replay-{self.accelerator.process_index}-{i:04}.safetensors"
            save_file({name: column.contiguous() for name, column in columns.items()}, path)

    def load(self, folder: Path) -> None:
        files = sorted(folder.glob("replay-*.safetensors"))
        processes = len({path.name.split("-")[1] for path in files})
        if processes != self.accelerator.num_processes:
            raise UserError(
                f"{folder}: its replay is that of {processes} processes; resume with as many, or start anew"
            )
        self.kept.clear()
        for path in (p for p in files if p.name.split("-")[1] == str(self.accelerator.process_index)):
            x = {name: t.to(self.accelerator.device) for name, t in load_file(path).items()}
            sequences = Sequences(*(x[field.name] for field in fields(Sequences)))
            batch = Rollout(
                sequences, x["log_probs"], x["entropy"], x["prompts"].tolist(), log_mixture=x["log_mixture"]
            )
            scores, prefixes = (
                {name.removeprefix(start): t for name, t in x.items() if name.startswith(start)}
                for start in ("score.", "prefix.")
            )
            self.kept.append(Scored(batch, x["log_a"], scores, prefixes))
