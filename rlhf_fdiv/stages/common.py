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
from rlhf_fdiv.cards import write_cards
from rlhf_fdiv.config import STAGES, RunConfig
from rlhf_fdiv.config.checks import validate
from rlhf_fdiv.errors import UserError, did_you_mean, one_line
from rlhf_fdiv.hub import push
from rlhf_fdiv.rewards import RewardModel, with_parts
from rlhf_fdiv.stages.inputs import check_inputs
from rlhf_fdiv.stages.stopping import noticed
from rlhf_fdiv.tracking import RunFolder, is_finished


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
