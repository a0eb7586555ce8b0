"""Scorers: what a text is worth. A config names them once; targets use them, and evaluation reports them all.

Each scorer's fields are its YAML schema. It maps prompts and completions to finite numbers, one a text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import MinLen
from pydantic import AfterValidator

from rlhf_fdiv.data import RATINGS, read_rows
from rlhf_fdiv.errors import UserError, did_you_mean
from rlhf_fdiv.functions import Score, by_keyword, in_threads
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
