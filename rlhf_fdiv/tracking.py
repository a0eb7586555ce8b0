"""The run folder: what was asked, what ran, what came out. A finished stage is never run again and never overwritten."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rlhf_fdiv.config import STAGES, RunConfig, differences, dump, to_dict
from rlhf_fdiv.data import file_hash
from rlhf_fdiv.errors import UserError

_FREE_KEYS = ("stages", "resume", "report_to", "output_dir")  # may change between two calls of one run
_MADE_FROM = {  # the keys that what a stage makes depends on
    "sft": ("model.name_or_path", "model.dtype", "data.sft_train", "sft", "seed"),
    "reward": ("model.name_or_path", "model.dtype", "data.preferences_train", "reward", "seed"),
    "policy": ("model", "data.prompts_train", "policy", "divergence", "objective", "target", "estimator", "seed"),
    "prefer": ("model", "data.preferences_train", "prefer", "divergence", "objective", "seed"),
    "distil": ("model", "data.prompts_train", "data.sft_train", "distil", "divergence", "objective", "seed"),
}


def _made_from(stage: str, config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that `stage` depends on, by dotted key."""
    values: dict[str, Any] = {}
    for key in _MADE_FROM.get(stage, ()):
        section, _, field = key.partition(".")
        values[key] = (config.get(section) or {}).get(field) if field else config.get(section)
    return values


class RunFolder:
    """`<output_dir>/<name>/`: resolved_config.yaml, manifest.json and a folder for each stage."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = config.folder

    def prepare(self) -> None:
        """Checks an earlier run of this name and writes resolved_config.yaml.

        Raises UserError where the config has changed and `resume` does not say from which stage to run again.
        """
        written = self.path / "resolved_config.yaml"
        if written.is_file():
            old = read_resolved(self.path)
            changed = differences(old, to_dict(self.config), ignore=_FREE_KEYS)
            if changed and self.config.resume is None:
                raise UserError(
                    f"{self.path}: holds a run with another config ({'; '.join(changed)}). Give it a new name=…, "
                    "or resume=STAGE to run again from that stage on; what is there is kept aside"
                )
            if self.config.resume is not None:
                self._check_kept(old, self.config.resume)
                self._set_aside_from(self.config.resume)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made: {error}") from error
        write_atomically(written, dump(dataclasses.replace(self.config, resume=None)))

    def _check_kept(self, old: dict[str, Any], resume: str) -> None:
        """Raises UserError where a stage before `resume` was made with another config."""
        new = to_dict(self.config)
        for stage in STAGES[: STAGES.index(resume)]:
            changed = differences(_made_from(stage, old), _made_from(stage, new))
            if changed and self.stage(stage).exists():
                raise UserError(
                    f"{self.path}: its {stage} stage was made with another config ({'; '.join(changed)}), and "
                    f"resume={resume} would keep it: resume={stage} runs it again, or give the run a new name=…"
                )

    def _set_aside_from(self, stage: str) -> None:
        for name in STAGES[STAGES.index(stage) :]:
            if (self.path / name).exists():
                n = next(i for i in range(1, 10**6) if not (self.path / f"{name}.before-{i}").exists())
                (self.path / name).rename(self.path / f"{name}.before-{n}")

    def stage(self, name: str) -> Path:
        return self.path / name

    def find(self, stage: str) -> Path | None:
        """The folder of a finished stage: of this run, or of the run that `reuse` names."""
        if is_finished(self.stage(stage)):
            return self.stage(stage)
        if self.config.reuse is None or stage not in ("sft", "reward"):
            return None
        other = Path(self.config.reuse)
        if not is_finished(other / stage):
            raise UserError(f"reuse: {other / stage} is not a finished stage")
        theirs = read_resolved(other)
        if changed := differences(_made_from(stage, theirs), _made_from(stage, to_dict(self.config))):
            raise UserError(f"reuse: the {stage} stage of {other} was made with another config ({'; '.join(changed)})")
        return other / stage

    @contextlib.contextmanager
    def running(self, name: str, writes: bool = True) -> Iterator[Path]:
        """Times a stage and, on the process that writes, marks it finished; an exception leaves it unfinished."""
        folder = self.stage(name)
        folder.mkdir(parents=True, exist_ok=True)
        start = time.time()
        yield folder
        if not writes:
            return
        write_atomically(folder / "finished.json", json.dumps({"seconds": round(time.time() - start, 2)}))
        self._note(name, round(time.time() - start, 2))

    def _note(self, stage: str, seconds: float) -> None:
        path = self.path / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        config = to_dict(self.config)
        data = {k: v for k, v in config["data"].items() if v}
        data |= {f"scorers.{name}.data": spec["data"] for name, spec in config["scorers"].items() if "data" in spec}
        manifest.update(environment(), name=self.config.name, seed=self.config.seed)
        manifest["data_sha256"] = {k: file_hash(v) for k, v in data.items()}
        manifest.setdefault("wall_seconds", {})[stage] = seconds
        write_atomically(path, json.dumps(manifest, indent=2))


def read_resolved(folder: Path) -> dict[str, Any]:
    """The config that a run was made with."""
    path = folder / "resolved_config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the config of a run; give this run a new name=…")
    return config


def is_finished(folder: Path) -> bool:
    return (folder / "finished.json").is_file()


def environment() -> dict[str, Any]:
    """Versions, machine and git commit."""
    packages = ("rlhf_fdiv", "torch", "transformers", "trl", "accelerate", "peft", "datasets")
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = git.stdout.strip() or None
    except OSError:
        commit = None
    return {
        "versions": {p: importlib.metadata.version(p) for p in packages} | {"python": platform.python_version()},
        "git_commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def write_atomically(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Metrics:
    """metrics.jsonl, and TensorBoard beside it, under the same names."""

    def __init__(self, folder: Path, report_to: str, resume_step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        self._drop_after(resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = None
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def _drop_after(self, step: int) -> None:
        """Rows after the checkpoint that a run resumes from will be written again."""
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a killed run leaves half a row
            write_atomically(self.path, "".join(line for line in whole if json.loads(line)["step"] <= step))

    def log(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **{k: _round(v) for k, v in values.items()}}) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _round(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete `checkpoint-N`; a checkpoint is written aside and renamed, so a half one has another name."""
    return max(_checkpoints(folder), key=_number, default=None)


def prune_checkpoints(folder: Path, keep: int) -> None:
    found = sorted(_checkpoints(folder), key=_number)
    for old in found[: max(len(found) - keep, 0)]:
        shutil.rmtree(old)


def _checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
