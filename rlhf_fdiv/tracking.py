"""The run folder: what was asked, what ran, what came out. A finished stage is never run again and never overwritten."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlhf_fdiv.checkpoints import newest_checkpoint, what_is_kept
from rlhf_fdiv.config import STAGES, RunConfig, differences, dump, parse, to_dict
from rlhf_fdiv.config.files import read_yaml
from rlhf_fdiv.data import file_hash
from rlhf_fdiv.errors import UserError, told_as
from rlhf_fdiv.rewards import with_parts

# may change between two calls of one run
_FREE_KEYS = ("stages", "resume", "report_to", "output_dir", "policy.vllm", "push_to_hub", "hub_private_repo")
MADE_FROM = {  # the keys that what a stage makes depends on
    "sft": ("model.name_or_path", "model.dtype", "data.sft_train", "sft", "seed"),
    "reward": ("model.name_or_path", "model.dtype", "data.preferences_train", "reward", "seed"),
    "policy": ("model", "data.prompts_train", "policy", "divergence", "objective", "target", "estimator", "seed"),
    "prefer": ("model", "data.preferences_train", "prefer", "divergence", "objective", "seed"),
    "distil": ("model", "data.prompts_train", "data.sft_train", "distil", "divergence", "objective", "seed"),
}


def _made_otherwise(stage: str, old: dict[str, Any], new: dict[str, Any], but_for: str = "", also: Any = ()) -> str:
    """Where two configs differ in what a stage is made from, in words."""
    keys = [key for key in (*MADE_FROM.get(stage, ()), *also) if key != but_for]
    return "; ".join(line for line in differences(old, new, _FREE_KEYS) if touches(line.partition(":")[0], keys))


def _made_with(folder: Path) -> dict[str, Any]:
    """The config of a run's folder; a key that did not exist when it was written has its default."""
    raw = read_yaml(folder / "resolved_config.yaml")
    try:
        return to_dict(parse(raw))
    except UserError:  # of a version whose keys were others: the differences will name them
        return raw


def touches(key: str, others: Iterable[str]) -> bool:
    """Whether a dotted key is one of the others, lies in one or holds one."""
    return any(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in others)


class RunFolder:
    """`<output_dir>/<name>/`: resolved_config.yaml, manifest.json and a folder for each stage."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = config.folder

    def prepare(self) -> None:
        """Checks an earlier run of this name and writes resolved_config.yaml.

        Raises UserError where the config has changed and `resume` does not say from which stage to run again, or would
        keep a stage that was made with another config.
        """
        written = self.path / "resolved_config.yaml"
        with self._writable():
            if written.is_file() and self.config.resume is not None:
                self._set_aside(self.config.resume, _made_with(self.path), to_dict(self.config))
            else:
                self.require_same_config()
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(written, dump(dataclasses.replace(self.config, resume=None)))

    def _writable(self) -> contextlib.AbstractContextManager[None]:
        """A fault of the file system becomes a UserError; a null byte in a path is a ValueError."""
        return told_as(f"{self.path}: the run's folder cannot be used", (OSError, ValueError))

    def require_same_config(self) -> None:
        """Raises UserError, naming each change, where the folder holds a run with another config."""
        written = self.path / "resolved_config.yaml"
        old = _made_with(self.path) if written.is_file() else to_dict(self.config)
        if changed := differences(old, to_dict(self.config), ignore=_FREE_KEYS):
            raise UserError(
                f"{self.path}: holds a run with another config ({'; '.join(changed)}). Give it a new name=…, "
                "or resume=STAGE to run again from that stage on; what is there is kept aside"
            )

    def _set_aside(self, resume: str, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Renames the stages from `resume` on; those before it must be as they would be made now."""
        first = STAGES.index(resume)
        paid = with_parts(self.config.target.scorers, self.config.scorers)
        for stage in STAGES[:first]:
            also = [f"scorers.{name}" for name in paid] if stage == "policy" else []
            if self.stage(stage).exists() and (changed := _made_otherwise(stage, old, new, also=also)):
                raise UserError(
                    f"{self.path}: its {stage} stage was made with another config ({changed}), and "
                    f"resume={resume} would keep it: resume={stage} runs it again, or give the run a new name=…"
                )
        for folder in filter(Path.exists, map(self.stage, STAGES[first:])):
            free = (folder.with_name(f"{folder.name}.before-{n}") for n in itertools.count(1))
            folder.rename(next(path for path in free if not path.exists()))

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
        made, wanted = _made_with(other), to_dict(self.config)
        if changed := _made_otherwise(stage, made, wanted, but_for="seed"):  # runs of several seeds may share it
            raise UserError(f"reuse: the {stage} stage of {other} was made with another config ({changed})")
        return other / stage

    @contextlib.contextmanager
    def running(
        self, name: str, writes: bool = True, at_end: Callable[[Path, str], None] = lambda run, stage: None
    ) -> Iterator[Path]:
        """Times a stage and, on the process that writes, calls `at_end` and marks it finished; an exception leaves it
        unfinished."""
        folder = self.stage(name)
        with self._writable():
            folder.mkdir(parents=True, exist_ok=True)
            if writes:
                self._require_same_data(name)
        start = time.time()
        try:
            yield folder
        except (OSError, SafetensorError) as error:
            problem = f"{folder}: the stage was stopped by {type(error).__name__}: {error}"
            raise UserError(f"{problem}. {what_is_kept(folder)}") from error
        if writes:
            seconds = round(time.time() - start, 2)
            self._note(name, seconds)
            at_end(self.path, name)
            write_atomically(folder / "finished.json", json.dumps({"seconds": seconds}))

    def _require_same_data(self, stage: str) -> None:
        """Raises UserError where a stage would go on from a checkpoint with other data than it began with."""
        path, data = self.stage(stage) / "data_sha256.json", to_dict(self.config)["data"]
        keys = [key.removeprefix("data.") for key in MADE_FROM.get(stage, ()) if key.startswith("data.")]
        now = {key: file_hash(data[key]) for key in keys if data[key]}
        if path.is_file() and newest_checkpoint(path.parent) and (then := json.loads(path.read_text())) != now:
            changed = ", ".join(f"data.{key} ({data[key]})" for key in now if then.get(key) != now[key])
            raise UserError(
                f"{path.parent}: {changed} changed since this stage began. Put back what it was, or begin the stage anew "
                f"with resume={stage}; what is there is kept aside"
            )
        write_atomically(path, json.dumps(now, indent=2))

    def _note(self, stage: str, seconds: float) -> None:
        path, config = self.path / "manifest.json", to_dict(self.config)
        manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"wall_seconds": {}}
        data = {k: v for k, v in config["data"].items() if v}
        data |= {f"scorers.{name}.data": spec["data"] for name, spec in config["scorers"].items() if "data" in spec}
        manifest |= environment() | {"name": config["name"], "seed": config["seed"]}
        elsewhere = {key for keys in MADE_FROM.values() for key in keys} - {*MADE_FROM.get(stage, ())}
        before = manifest.get("data_sha256", {})  # of what another stage has read, as it was then
        kept = {k: v for k, v in before.items() if k in data and f"data.{k}" in elsewhere}
        manifest["data_sha256"] = {k: kept[k] if k in kept else file_hash(v) for k, v in data.items()}
        manifest["wall_seconds"][stage] = seconds
        write_atomically(path, json.dumps(manifest, indent=2))


def is_finished(folder: Path) -> bool:
    return (folder / "finished.json").is_file()


def environment() -> dict[str, Any]:
    """Versions, machine and git commit."""
    packages = ("rlhf_fdiv", "torch", "transformers", "trl", "accelerate", "peft", "datasets")
    commit = ""
    with contextlib.suppress(OSError):  # without git
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = git.stdout.strip()
    return {
        "versions": {p: importlib.metadata.version(p) for p in packages} | {"python": platform.python_version()},
        "git_commit": commit or None,
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


def finite(value: Any) -> Any:
    """JSON has neither nan nor inf: both become null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_table(path: Path, columns: Any) -> None:
    """A Parquet file of what `pandas.DataFrame` takes; a column that Parquet cannot hold, of mixed types say, as JSON."""
    import pandas as pd

    table = pd.DataFrame(columns, dtype=object)
    for name in table:
        try:
            table[[name]].to_parquet(io.BytesIO())
        except Exception:  # of pyarrow, whatever it stumbles over
            table[name] = table[name].map(lambda value: json.dumps(value, default=str))
    table.to_parquet(path)


class Metrics:
    """metrics.jsonl, and a tracker beside it, under the same names; rows after `resume_step` are written again."""

    def __init__(self, folder: Path, report_to: str, resume_step: int = 0) -> None:
        path = folder / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a killed run leaves half a row
            write_atomically(path, "".join(line for line in whole if json.loads(line)["step"] <= resume_step))
        self._file = path.open("a", encoding="utf-8")
        self._kind = report_to
        self._tracker: Any = None if report_to == "none" else _tracker(report_to, folder, resume_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One row, six digits a figure, null for what is not finite."""
        rounded = {key: float(f"{value:.6g}") if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **rounded}) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker.log(values, step=step)

    def log_table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """The last 100 rows, in the tracker alone."""
        import pandas as pd

        plain = (str, int, float)  # a tracker takes no more
        table = pd.DataFrame(rows[-100:]).map(lambda x: x if isinstance(x, plain) else json.dumps(x, default=str))
        if self._kind == "wandb":
            self._tracker.log_table(name, dataframe=table, step=step)
        elif self._kind == "trackio":
            import trackio

            self._tracker.log({name: trackio.Table(dataframe=table)}, step=step)
        elif self._tracker is not None:
            self._tracker.log({name: table.to_html(index=False)}, step=step)

    def close(self) -> None:
        self._file.close()
        if self._tracker is not None:
            self._tracker.finish()


def _tracker(kind: str, folder: Path, resume_step: int) -> Any:
    """accelerate's, begun: the run is the project, the stage its run. wandb writes into the folder, for `wandb sync`, unless
    WANDB_MODE says otherwise."""
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    project, stage = folder.resolve().parent.name, folder.name
    tracker: Any
    if kind == "tensorboard":
        tracker = TensorBoardTracker("tensorboard", folder, purge_step=resume_step + 1)
    elif kind == "wandb":
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        tracker = WandBTracker(project, name=stage, id=f"{project}-{stage}", dir=folder, mode=mode, resume="allow")
    else:
        tracker = TrackioTracker(project, name=stage, resume="allow", embed=False, auto_log_cpu=False)
    tracker.start()
    return tracker
