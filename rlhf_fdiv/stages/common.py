"""What the stages share: finding what an earlier stage made, and starting one stage from the command line."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from typing import Any, get_type_hints

import datasets
import torch
import transformers
from accelerate import PartialState

from rlhf_fdiv import config as configs
from rlhf_fdiv import metrics
from rlhf_fdiv.cards import write_cards
from rlhf_fdiv.chat import is_chat
from rlhf_fdiv.config import STAGES, RunConfig, data_needs
from rlhf_fdiv.config.checks import validate
from rlhf_fdiv.data import (
    COMPLETIONS,
    PREFERENCES,
    PROMPTS,
    RATINGS,
    Rows,
    read_rows,
    reference_texts,
    tokenize_prompts,
)
from rlhf_fdiv.errors import UserError, did_you_mean, one_line
from rlhf_fdiv.hub import check_push, push
from rlhf_fdiv.models import load_tokenizer, teacher_context
from rlhf_fdiv.rewards import Function, NgramRidge, RewardModel, with_parts
from rlhf_fdiv.stages.stopping import noticed
from rlhf_fdiv.tracking import RunFolder, is_finished
from rlhf_fdiv.weights import context_length, require_own_tokenizer


def run_stage(name: str) -> None:
    """`python -m rlhf_fdiv.stages.<name> CONFIG [a.b=value …]`, the form that `accelerate launch -m` takes."""
    try:
        if len(sys.argv) < 2:
            raise UserError(f"usage: python -m rlhf_fdiv.stages.{name} CONFIG [a.b=value …]")
        execute(configs.load(sys.argv[1], [*sys.argv[2:], f"stages=[{name}]"]), [name])
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def execute(config: RunConfig, stages: list[str]) -> RunFolder:
    """Runs the stages in order; a finished one is skipped, an interrupted one goes on from its last checkpoint."""
    prepare_process()
    folder = RunFolder(config)
    main_process = int(os.environ.get("RANK", "0")) == 0
    say = functools.partial(print, flush=True) if main_process else lambda text: None
    check_inputs(config, stages)
    if main_process:
        folder.prepare()
    again = STAGES[STAGES.index(config.resume) :] if config.resume else ()  # others may look before these are put aside
    for name in stages:
        if name not in again and is_finished(folder.stage(name)):
            say(f"{name}: finished before, skipped")
        elif config.reuse and folder.find(name):
            say(f"{name}: taken from {config.reuse}")
        else:
            say(f"{name}: into {folder.stage(name)}")
            in_steps = name in ("sft", "policy", "prefer", "distil")
            with noticed(between_steps=in_steps), folder.running(name, main_process, write_cards) as out:
                importlib.import_module(f"rlhf_fdiv.stages.{name}").main(config, folder, out)
    if config.push_to_hub and main_process:
        say(push(config, folder))
    return folder


def check_inputs(config: RunConfig, stages: list[str]) -> None:
    """Reads every file that the stages will need, before any model is loaded. Raises UserError with all problems."""
    student = {"prompts_train": PROMPTS, "sft_train": COMPLETIONS}
    needs: dict[str, dict[str, dict[str, type]]] = {
        "sft": {"sft_train": COMPLETIONS},
        "reward": {"preferences_train": PREFERENCES, "preferences_eval": PREFERENCES},
        "policy": {"prompts_train": PROMPTS},
        "prefer": {"preferences_train": PREFERENCES, "preferences_eval": PREFERENCES},
        "distil": {k: v for k, v in student.items() if k in data_needs(config, "distil")},
        "evaluate": {"prompts_eval": PROMPTS, "sft_eval": COMPLETIONS},
    }
    problems: list[str] = []
    prompts: dict[str, Rows] = {}
    messages: dict[str, Rows] = {}

    def collect(check: Any, *args: Any) -> Any:
        try:
            return check(*args)
        except UserError as error:
            problems.extend(p for p in error.problems if p not in problems)

    def read_model(name: str) -> tuple[Any, int | None]:
        tokenizer, context = collect(load_tokenizer, name), collect(context_length, name)
        if tokenizer is not None and context is not None:
            collect(require_own_tokenizer, name, tokenizer)
        return tokenizer, context

    if config.report_to in ("wandb", "trackio") and importlib.util.find_spec(config.report_to) is None:
        problems.append(f"report_to: {config.report_to} is not installed: pip install 'rlhf_fdiv[tracking]'")
    if config.push_to_hub:
        collect(check_push, config.push_to_hub)
    continued = {"prefer": ("preferences_train", "preferences_eval"), "distil": ("sft_train",)}
    whole = [key for stage in stages for key in continued.get(stage, ())]  # whose prompts must leave room for a text
    for key, fields in {k: v for stage in stages for k, v in needs[stage].items()}.items():
        source = getattr(config.data, key)
        rows = collect(read_rows, source, fields) if source else None
        if rows and fields is PREFERENCES and all(row["chosen"] == row["rejected"] for row in rows):
            problems.append(f"{source}: every pair has the same text twice; nothing can be learned from it")
        if rows and (fields is PROMPTS or key in whole):
            prompts[source] = rows
        elif rows and is_chat([rows[0]["prompt"]]):
            messages[source] = rows
    if "evaluate" in stages:
        collect(metrics.require_harness, config.evaluate.lm_eval, config.evaluate.mauve)
        rows = prompts.get(str(config.data.prompts_eval))
        if config.evaluate.mauve and rows and not collect(reference_texts, rows, config.data.sft_eval, 1):
            problems.append(
                f"evaluate.mauve: needs `references` in every row of {config.data.prompts_eval}, or data.sft_eval"
            )
    if "policy" in stages or "evaluate" in stages:
        for spec in config.scorers.values():
            if isinstance(spec, NgramRidge):
                collect(read_rows, spec.data, RATINGS)
            elif isinstance(spec, Function):
                collect(spec.open, torch.device("cpu"))
    policy_model = config.training.model or config.model.name_or_path
    tokenizer, context = read_model(policy_model)
    first = tokenizer
    if {"sft", "reward"} & set(stages) and config.model.name_or_path != policy_model:
        first, _ = read_model(config.model.name_or_path)
    if "distil" in stages and tokenizer is not None and context is not None:
        room = collect(teacher_context, str(config.distil.teacher), policy_model)
        context = room and min(context, room)
    if tokenizer is not None and context is not None:
        for source, rows in prompts.items():
            collect(tokenize_prompts, rows, tokenizer, source, context - config.training.max_completion_length)
    if first is not None:  # whether its chat template takes them; their length is for the stages to judge
        for source, rows in messages.items():
            collect(tokenize_prompts, rows, first, source, sys.maxsize)
    if problems:
        raise UserError(*problems)


def prepare_process() -> None:
    """No telemetry, no library chatter, and on a CPU the memory of one step kept for the next.

    glibc returns every large tensor to the system and takes it back page by page: a forward of 32 × 36 tokens of a
    135 M model took 8.7 s that way and 0.3 s with its memory kept, on a virtual machine with two cores.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not torch.cuda.is_available() and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**26)):
            libc.mallopt(option, value)


def process_state() -> PartialState:
    """This process among those that were launched; without a GPU they are CPU processes, which must be said."""
    return PartialState(cpu=not torch.cuda.is_available())


def starting_model(config: RunConfig, folder: RunFolder) -> str:
    """The model that training starts from and is held to: `policy.model`, the run's SFT model, or `model`."""
    if config.training.model is not None:
        return config.training.model
    made = folder.find("sft") if "sft" in config.stages or config.reuse or folder.stage("sft").exists() else None
    if made is not None:
        return str(made / "model")
    if folder.stage("sft").exists() or "sft" in config.stages:
        raise UserError(
            f"{folder.stage('sft')}: the sft stage is not finished; run it first, or set {config.objective.stage}.model"
        )
    return config.model.name_or_path


def resolve_scorers(config: RunConfig, folder: RunFolder, needed: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The config's scorers, or those that `needed` are made of, with the run's own reward model where a path is left open."""
    names = with_parts(config.scorers if needed is None else needed, config.scorers)
    resolved = {}
    for name, spec in ((n, s) for n, s in config.scorers.items() if n in names):
        if isinstance(spec, RewardModel) and spec.path is None:
            made = folder.find("reward")
            if made is None:
                raise UserError(
                    f"scorers.{name}: no finished reward stage in {folder.path}; run it, or give scorers.{name}.path"
                )
            spec = dataclasses.replace(spec, path=str(made / "model"))
        resolved[name] = spec
    return resolved


def trainer_arguments(cls: Any, stage: str, options: Any, config: RunConfig, out: Any, **fixed: Any) -> Any:
    """TRL's own config object from a section, with `training_args` for the fields the section does not name.

    Raises UserError, naming the key, before any model is loaded.
    """
    known, problems, given = get_type_hints(cls), [], {}
    own = {"output_dir", "seed", *fixed, *(x.name for x in dataclasses.fields(options))}
    for key, value in options.training_args.items():
        where = f"{stage}.training_args.{key}"
        if key in own:
            problems.append(f"{where}: the run has a key of its own for it")
        elif key not in known:
            problems.append(f"{where}: unknown key{did_you_mean(key, known)}")
        else:
            given[key] = validate(known[key], value, where, problems)
    if problems:
        raise UserError(*problems)
    shared = {k: v for k, v in dataclasses.asdict(options).items() if k in known}
    save = {"save_strategy": "steps" if getattr(options, "save_steps", 0) else "no"}
    if not shared.get("save_steps"):
        shared.pop("save_steps", None)
    on_cpu = {"use_cpu": not torch.cuda.is_available()}
    quiet = {
        "report_to": "none",
        "logging_steps": 5,
        "bf16": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": None,
    }
    values = {**quiet, **save, **on_cpu, **shared, **fixed, **given}
    with training_by_trl(stage, options):
        return cls(output_dir=str(out), seed=config.seed, **values)


@contextlib.contextmanager
def training_by_trl(stage: str, options: Any) -> Iterator[None]:
    """What TRL raises where it was given `training_args`, which only it can judge, is told as a user's mistake."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not options.training_args:
            raise
        keys = ", ".join(options.training_args)
        raise UserError(f"{stage}: TRL's trainer: {one_line(error)} (with {stage}.training_args {keys})") from error


def require_rows(trainer: Any, source: str, stage: str) -> None:
    """Raises UserError where TRL has left out every row for its length."""
    if not len(trainer.train_dataset):
        raise UserError(f"{source}: no row fits into {stage}.max_length = {trainer.args.max_length} tokens; raise it")
