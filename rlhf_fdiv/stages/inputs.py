"""Everything that stages will read, looked at before any model is loaded; all problems are told at once."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch

from rlhf_fdiv import metrics
from rlhf_fdiv.chat import is_chat
from rlhf_fdiv.config import RunConfig, data_needs
from rlhf_fdiv.data import (
    COMPLETIONS,
    PREFERENCES,
    PROMPTS,
    RATINGS,
    Rows,
    extra_columns,
    read_rows,
    reference_texts,
    tokenize_prompts,
)
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.functions import required_columns
from rlhf_fdiv.hub import check_push
from rlhf_fdiv.models import load_tokenizer, teacher_context
from rlhf_fdiv.parts import load
from rlhf_fdiv.reward_models import check_reward_model
from rlhf_fdiv.rewards import Function, NgramRidge, RewardModel, with_parts
from rlhf_fdiv.weights import context_length, require_own_tokenizer

_PAIRS = {"preferences_train": PREFERENCES, "preferences_eval": PREFERENCES}
_READ: dict[str, dict[str, dict[str, type]]] = {  # by each stage, of `data`
    "sft": {"sft_train": COMPLETIONS},
    "reward": _PAIRS,
    "policy": {"prompts_train": PROMPTS},
    "prefer": _PAIRS,
    "distil": {"prompts_train": PROMPTS, "sft_train": COMPLETIONS},
    "evaluate": {"prompts_eval": PROMPTS, "sft_eval": COMPLETIONS},
}
# whose prompts must leave room for a text
_CONTINUED = {"prefer": ("preferences_train", "preferences_eval"), "distil": ("sft_train",)}


def check_inputs(config: RunConfig, stages: list[str]) -> None:
    """Reads every file that the stages will need. Raises UserError with all problems."""
    found = _Inputs(config, stages)
    found.packages()
    found.data()
    found.scorers()
    found.models()
    if found.problems:
        raise UserError(*found.problems)


class _Inputs:
    def __init__(self, config: RunConfig, stages: list[str]) -> None:
        self.config, self.stages = config, stages
        self.problems: list[str] = []
        self.prompts: dict[str, Rows] = {}  # by source; their completions must fit behind them
        self.messages: dict[str, Rows] = {}  # the others whose prompts are messages

    def collect(self, check: Any, *args: Any) -> Any:
        try:
            return check(*args)
        except UserError as error:
            self.problems += [p for p in error.problems if p not in self.problems]

    def packages(self) -> None:
        tracker, push = self.config.report_to, self.config.push_to_hub
        if tracker in ("wandb", "trackio") and importlib.util.find_spec(tracker) is None:
            self.problems.append(f"report_to: {tracker} is not installed: pip install 'rlhf_fdiv[tracking]'")
        if push:
            self.collect(check_push, push)
        if "evaluate" in self.stages:
            self.collect(metrics.require_harness, self.config.evaluate.lm_eval, self.config.evaluate.mauve)

    def data(self) -> None:
        data, evaluate = self.config.data, self.config.evaluate
        continued = [key for stage in self.stages for key in _CONTINUED.get(stage, ())]
        read = {key: fields for stage in self.stages for key, fields in _READ[stage].items()
                if stage != "distil" or key in data_needs(self.config, stage)}  # fmt: skip
        for key, fields in read.items():
            source = getattr(data, key)
            rows = self.collect(read_rows, source, fields) if source else None
            if rows and fields is PREFERENCES and all(row["chosen"] == row["rejected"] for row in rows):
                self.problems.append(f"{source}: every pair has the same text twice; nothing can be learned from it")
            if rows and (fields is PROMPTS or key in continued):
                self.prompts[source] = rows
            elif rows and is_chat([rows[0]["prompt"]]):
                self.messages[source] = rows
        rows = self.prompts.get(str(data.prompts_eval)) if "evaluate" in self.stages and evaluate.mauve else None
        if rows and not self.collect(reference_texts, rows, data.sft_eval, 1):
            self.problems.append(
                f"evaluate.mauve: needs `references` in every row of {data.prompts_eval}, or data.sft_eval"
            )

    def scorers(self) -> None:
        if not {"policy", "evaluate"} & set(self.stages):
            return
        specs, logged = self.config.scorers, (*self.config.target.scorers, *self.config.policy.logged_scorers)
        used = with_parts(specs if "evaluate" in self.stages else logged, specs)
        prompts = [row["prompt"] for rows in self.prompts.values() for row in rows[:1]]
        for name, spec in specs.items():
            if isinstance(spec, NgramRidge):
                self.collect(read_rows, spec.data, RATINGS)
            elif isinstance(spec, Function):
                if self.collect(spec.open, torch.device("cpu")) and name in used:
                    self.columns(name, spec.path, {"prompts_train": with_parts(logged, specs), "prompts_eval": specs})
            elif isinstance(spec, RewardModel) and spec.path and name in used:
                self.collect(check_reward_model, spec.path, prompts)

    def columns(self, name: str, path: str, asked: dict[str, Any]) -> None:
        """Whether the data has what a function cannot do without; `asked` are the scorers of each of its keys."""
        for source in (getattr(self.config.data, key) for key, names in asked.items() if name in names):
            rows = self.prompts.get(str(source))
            lacking = required_columns(load(path)) - extra_columns(rows).keys() if rows else set()
            if lacking:
                self.problems.append(
                    f"scorers.{name}: {path} needs {', '.join(sorted(lacking))}, no column of all rows of {source}"
                )

    def models(self) -> None:
        config, stages = self.config, self.stages
        start = config.training.model or config.model.name_or_path
        tokenizer, context = self.model(start)
        first = tokenizer
        if {"sft", "reward"} & set(stages) and config.model.name_or_path != start:
            first, _ = self.model(config.model.name_or_path)
        if "distil" in stages and tokenizer is not None and context is not None:
            room = self.collect(teacher_context, str(config.distil.teacher), start)
            context = room and min(context, room)
        if tokenizer is not None and context is not None:
            for source, rows in self.prompts.items():
                room = context - config.training.max_completion_length
                self.collect(tokenize_prompts, rows, tokenizer, source, room)
        if first is not None:  # whether its chat template takes them; their length is for the stages to judge
            for source, rows in self.messages.items():
                self.collect(tokenize_prompts, rows, first, source, sys.maxsize)

    def model(self, name: str) -> tuple[Any, int | None]:
        tokenizer, context = self.collect(load_tokenizer, name), self.collect(context_length, name)
        if tokenizer is not None and context is not None:
            self.collect(require_own_tokenizer, name, tokenizer)
        return tokenizer, context
