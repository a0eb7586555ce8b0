"""Scorers: what a text is worth. A config names them once; targets use them, and evaluation reports them all.

Each scorer's fields are its YAML schema. It maps prompts and completions to finite numbers, one a text.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import MinLen
from pydantic import AfterValidator
from torch import Tensor

from rlhf_fdiv.chat import Prompt, answers, is_chat
from rlhf_fdiv.data import RATINGS, read_rows
from rlhf_fdiv.errors import UserError, did_you_mean
from rlhf_fdiv.functions import Score, by_keyword, collected, in_threads
from rlhf_fdiv.parts import load
from rlhf_fdiv.ranges import Count, NotNegative, Number, Positive


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] < bounds[1]:
        raise ValueError(f"must be a lower and a higher bound, not {bounds}")
    return bounds


Bounds = Annotated[tuple[Number, Number], AfterValidator(_ordered)]


@dataclass(frozen=True)
class RewardModel:
    """A trained reward model: the folder that the reward stage made, or any sequence classifier with one label.

    `path` defaults to the run's own reward stage. Scores are clipped to `clip`.
    """

    path: str | None = None
    clip: Bounds | None = None
    batch_size: Count = 64
    name: ClassVar[str] = "reward_model"

    def open(self, device: torch.device) -> Score:
        from rlhf_fdiv.reward_models import Judge

        if self.path is None:
            raise UserError("scorers: a reward_model needs its `path`, or a reward stage in the same run")
        return Judge(self.path, device, self.batch_size)


@dataclass(frozen=True)
class NgramRidge:
    """Ridge regression on TF-IDF of word n-grams, fitted on rated texts: a score of quite another kind than a neural
    reward, for checking it ("gold"). Clipped to the range of the ratings' scale."""

    data: str
    clip: Bounds = (-4.0, 4.0)
    alpha: NotNegative = 1.0
    name: ClassVar[str] = "ngram_ridge"

    def open(self, device: torch.device) -> Score:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline

        rows = read_rows(self.data, RATINGS)
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=r"(?u)\b\w[\w']*\b")
        model = make_pipeline(words, Ridge(alpha=self.alpha))
        try:
            model.fit([r["text"] for r in rows], [r["rating"] for r in rows])
        except ValueError as error:
            raise UserError(f"{self.data}: no ridge regression can be fitted on these texts: {error}") from error
        return lambda prompts, completions, **columns: model.predict(completions)


@dataclass(frozen=True)
class Pattern:
    """1 where a regular expression is found in the completion (case ignored), else 0."""

    pattern: str
    name: ClassVar[str] = "pattern"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern: is not a regular expression: {error}") from error

    def open(self, device: torch.device) -> Score:
        found = re.compile(self.pattern, re.IGNORECASE)
        return lambda prompts, completions, **columns: [float(bool(found.search(c))) for c in completions]


@dataclass(frozen=True)
class Length:
    """The number of words of the completion, divided by `scale`."""

    scale: Positive = 1.0
    name: ClassVar[str] = "length"

    def open(self, device: torch.device) -> Score:
        return lambda prompts, completions, **columns: [len(c.split()) / self.scale for c in completions]


@dataclass(frozen=True)
class Threshold:
    """1 where another scorer exceeds `above`, else 0."""

    of: str
    above: Number = 0.0
    name: ClassVar[str] = "threshold"
    parts = property(lambda self: (self.of,))


@dataclass(frozen=True)
class Sum:
    """Σ weight × score of other scorers, by name; where one gave None, of those that apply, as in TRL's GRPOTrainer."""

    of: Annotated[dict[str, Number], MinLen(1)]
    name: ClassVar[str] = "sum"
    parts = property(lambda self: tuple(self.of))


@dataclass(frozen=True)
class Function:
    """A user's function by dotted path, with TRL's signature (prompts, completions, **columns) → list of numbers.

    It is called by keyword, with as much of this as it has parameters for: prompts, completions, completion_ids, each other
    column of the prompts' data, and trainer_state, of which only global_step and max_steps are filled in. None says that it
    does not apply to a completion, which is for parts of a `sum`. It may be async: all that wait do so together.

    With `num_workers` above 1 that many threads each score a part of the completions: for functions that wait, on a service
    or a checker's process, and that judge each completion by itself. With a `timeout` a call that takes longer, in seconds,
    ends the run in place of waiting for ever.
    """

    path: str
    num_workers: Count = 1
    timeout: Positive | None = None
    name: ClassVar[str] = "function"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", self.path):
            raise ValueError(f"path: must look like package.module:function, not {self.path!r}")

    def open(self, device: torch.device) -> Score:
        found = load(self.path)
        if not callable(found):
            raise UserError(f"scorers: {self.path} is not a function")
        plain = self.num_workers == 1 and self.timeout is None
        return by_keyword(found) if plain else in_threads(by_keyword(found), self.num_workers, self.timeout)


_KINDS = (RewardModel, NgramRidge, Pattern, Length, Threshold, Sum, Function)
SCORERS: dict[str, Any] = {cls.name: cls for cls in _KINDS}


def with_parts(names: Iterable[str], specs: dict[str, Any]) -> list[str]:
    """The names, and those of all that these scorers are made of; each once."""
    found = list(names)
    for name in found:  # which grows
        found += [part for part in getattr(specs.get(name), "parts", ()) if part not in found]
    return found


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
        return self.of_prefixes(names, None, prompts=prompts, completions=completions, **columns)

    def of_prefixes(
        self, names: list[str], whole: Any, /, prompts: list[Prompt], completions: list[str], **columns: Any
    ) -> dict[str, Tensor]:
        """The same of prefixes of some completions: `whole` is what a scorer with an `of_prefixes` takes in their place."""
        needed, as_messages = with_parts(names, self.specs), is_chat(prompts)

        def start(name: str) -> Any:
            spec = self.specs[name]
            if name not in self._open:
                self._open[name] = spec.open(self.device)
            read = getattr(self._open[name], "of_prefixes", None) if whole else None
            if read and (values := read(*whole)) is not None:
                return values
            # a user's function gets TRL's form, scorers of ours read text
            texts = answers(completions) if as_messages and isinstance(spec, Function) else completions
            rows = {"prompts": prompts, "completions": texts, **columns}
            return self._open[name](**{k: copy.copy(v) for k, v in rows.items()})  # what it changes is its own

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
            return _checked(name, values, completions, getattr(spec, "clip", None)).to(self.device)

        for name in (n for n in names if not self._may_lack(n)):
            for row in scores(name).isnan().nonzero().flatten().tolist():
                raise UserError(
                    f"scorer {name!r} does not apply to completion {row}, {completions[row]!r:.200}: None is for the "
                    "parts of a `sum`, and for each completion at least one of them must give a number"
                )
        return {name: scores(name) for name in names}

    def _may_lack(self, name: str) -> bool:
        """Whether a scorer may leave completions out: a part of a `sum`, or a threshold over one, and of no target."""
        spec = self.specs[name]
        over = isinstance(spec, Threshold) and self._may_lack(spec.of)
        return name not in self._needed and (over or name in self._summed)


def _told(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """The function's answer; whatever it raises becomes a UserError that names the scorer."""
    try:
        return function(*args)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"scorer {name!r} raised {type(error).__name__}: {error}") from error


def _checked(name: str, values: Any, completions: list[str], clip: tuple[float, float] | None) -> Tensor:
    """A scorer's answer as [B] in float32, within `clip`; nan for None."""
    lacking = [v is None for v in values] if isinstance(values, list | tuple) else []
    if any(lacking):
        values = [math.nan if v is None else v for v in values]
    try:
        scores = torch.as_tensor(values, dtype=torch.float32).detach()
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"scorer {name!r} gave something that is not a list of numbers: {error}") from error
    if scores.shape != (len(completions),):
        raise UserError(f"scorer {name!r} gave shape {[*scores.shape]} for {len(completions)} completions")
    if clip is not None:
        scores = scores.clamp(*clip)
    for row in (~scores.isfinite()).nonzero().flatten().tolist():
        if not lacking or not lacking[row]:
            raise UserError(
                f"scorer {name!r} gave {float(scores[row])} for completion {row}: {completions[row]!r:.200}"
            )
    return scores


# figures and columns that stand beside the scores in logs, tables and reports: no scorer may have such a name
_FIGURES = """
step prompts completions objective kl_reference divergence_target log_z ess_log_z out_of_support entropy length
finished tokens seconds loss grad_norm coverage rollout_mismatch ess_importance clipped_importance clip_fraction
explained_variance distinct_1 distinct_2 distinct_3 self_bleu bleu rouge_l perplexity bits_per_character mauve samples
acceptance tv tv_bound kl_target kl_bound value method log_b
"""
RESERVED = frozenset(_FIGURES.split())
_ENDS = ("_gain_se", "_gain", "_se")  # of figures that stand beside a score


def check_scorers(specs: dict[str, Any], used: tuple[str, ...]) -> list[str]:
    """Problems of a config's scorers and of the names that targets use."""
    problems = [f"target: no scorer named {n!r}{did_you_mean(n, specs)}" for n in used if n not in specs]
    for name, spec in specs.items():
        if name in RESERVED:
            problems.append(f"scorers.{name}: a figure of every report has this name; call it {name}_score")
        of, end = next(((name.removesuffix(end), end) for end in _ENDS if name.endswith(end)), ("", ""))
        if of in specs or of in RESERVED:
            problems.append(
                f"scorers.{name}: `{end}` is how reports name an error or a gain of {of!r}; give it another name"
            )
        for part in getattr(spec, "parts", ()):
            if part not in specs:
                problems.append(f"scorers.{name}.of: {part!r} is not another scorer{did_you_mean(part, specs)}")
            elif name in with_parts([part], specs):
                problems.append(f"scorers.{name}.of: leads back to {name!r}; scorers cannot go in a circle")
    return problems
