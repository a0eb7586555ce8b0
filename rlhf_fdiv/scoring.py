"""The scorers of a run at work: each asked once a step, what it answers checked, and what is made of others put together."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from rlhf_fdiv.chat import Prompt, answers, is_chat
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.functions import Score, collected
from rlhf_fdiv.rewards import Function, Sum, Threshold, with_parts

Rows = Callable[[], dict[str, Any]]  # the columns that scorers take, prompts and completions among them


class Scorers:
    """The scorers of a run, opened once: `scores(names, prompts, completions)` → name → [B]. Those of its `targets` must give
    a number for every completion."""

    def __init__(self, specs: dict[str, Any], device: torch.device, targets: Iterable[str] = ()) -> None:
        self.specs, self.device = specs, device
        self._needed = {*targets}
        self._summed = {part for spec in specs.values() if isinstance(spec, Sum) for part in spec.of}
        self.names = list(specs)
        self._open: dict[str, Score] = {}

    def __call__(
        self, names: list[str], /, prompts: list[Prompt], completions: list[str], **columns: Any
    ) -> dict[str, Tensor]:
        """Each scorer's scores [B] in float32, on the device; nan where one that is only a part of a `sum` gave None.

        Raises UserError for a wrong count, type or nan, and for a None elsewhere.
        """
        rows = {"prompts": prompts, "completions": completions, **columns}
        return self._scores(names, lambda: rows, len(completions))

    def of_prefixes(self, names: list[str], tokenizer: Any, /, **columns: Any) -> dict[str, Tensor]:
        """The same of what stands before each token of each completion, one completion after the other. A scorer with an
        `of_prefixes` is asked about whole completions; for the others each prefix is a text."""
        whole = columns["prompts"], columns["completion_ids"]
        rows = functools.cache(lambda: prefixes(tokenizer, columns))
        try:
            return self._scores(names, rows, sum(map(len, whole[1])), lambda: (tokenizer, *copy.deepcopy(whole)))
        except UserError as error:
            hint = "estimator.critic: prefixes asks about unfinished completions too, the empty one among them"
            raise UserError(*error.problems, hint) from error

    def _scores(
        self, names: list[str], rows: Rows, count: int, whole: Callable[[], Any] | None = None
    ) -> dict[str, Tensor]:
        def start(name: str) -> Any:
            spec = self.specs[name]
            if name not in self._open:
                self._open[name] = spec.open(self.device)
            of_prefixes = getattr(self._open[name], "of_prefixes", None)
            if whole and of_prefixes and (values := of_prefixes(*whole())) is not None:
                return values
            columns = dict(rows())
            if isinstance(spec, Function) and is_chat(columns["prompts"]):  # TRL's form; scorers of ours read text
                columns["completions"] = answers(columns["completions"])
            return self._open[name](**{k: copy.copy(v) for k, v in columns.items()})  # what it changes is its own

        needed = with_parts(names, self.specs)
        started = {n: _told(n, start, n) for n in needed if not hasattr(self.specs[n], "parts")}

        @functools.cache  # what is made of the same scorer shares its scores
        def scores(name: str) -> Tensor:
            spec = self.specs[name]
            if isinstance(spec, Threshold):
                of = scores(spec.of)
                return torch.where(of.isnan(), of, (of > spec.above).float())
            if isinstance(spec, Sum):
                parts = torch.stack([weight * scores(part) for part, weight in spec.of.items()])
                return torch.where(parts.isnan().all(0), math.nan, parts.nansum(0))
            values = _told(name, collected, started[name])
            return _checked(name, values, count, rows, getattr(spec, "clip", None)).to(self.device)

        for name in (n for n in names if not self._may_lack(n)):
            for row in scores(name).isnan().nonzero().flatten().tolist():
                raise UserError(
                    f"scorer {name!r} does not apply to completion {row}, {rows()['completions'][row]!r:.200}: None is for "
                    "the parts of a `sum`, and for each completion at least one of them must give a number"
                )
        return {name: scores(name) for name in names}

    def _may_lack(self, name: str) -> bool:
        """Whether a scorer may leave completions out: a part of a `sum`, or a threshold over one, and of no target."""
        spec = self.specs[name]
        over = isinstance(spec, Threshold) and self._may_lack(spec.of)
        return name not in self._needed and (over or name in self._summed)


def prefixes(tokenizer: Any, columns: dict[str, Any]) -> dict[str, Any]:
    """The columns of some completions as those of all their prefixes: what stands before each token, the empty text first."""
    ids = columns["completion_ids"]
    places = [(i, t) for i, row in enumerate(ids) for t in range(len(row))]
    before = [ids[i][:t] for i, t in places]
    repeated = {name: [column[i] for i, _ in places] for name, column in columns.items() if isinstance(column, list)}
    texts = tokenizer.batch_decode(before, skip_special_tokens=True)
    return columns | repeated | {"completion_ids": before, "completions": texts}


def _told(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """The function's answer; whatever it raises becomes a UserError that names the scorer."""
    try:
        return function(*args)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"scorer {name!r} raised {type(error).__name__}: {error}") from error


def _checked(name: str, values: Any, count: int, rows: Rows, clip: tuple[float, float] | None) -> Tensor:
    """A scorer's answer as [B] in float32, within `clip`; nan for None."""
    lacking = [v is None for v in values] if isinstance(values, list | tuple) else []
    if any(lacking):
        values = [math.nan if v is None else v for v in values]
    try:
        scores = torch.as_tensor(values, dtype=torch.float32).detach()
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"scorer {name!r} gave something that is not a list of numbers: {error}") from error
    if scores.shape != (count,):
        raise UserError(f"scorer {name!r} gave shape {[*scores.shape]} for {count} completions")
    if clip is not None:
        scores = scores.clamp(*clip)
    for row in (~scores.isfinite()).nonzero().flatten().tolist():
        if not lacking or not lacking[row]:
            text = rows()["completions"][row]
            raise UserError(f"scorer {name!r} gave {float(scores[row])} for completion {row}: {text!r:.200}")
    return scores
