"""Running a grid, and comparing what came out: `rlhf-fdiv ablate` and `rlhf-fdiv report`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rlhf_fdiv import comparison
from rlhf_fdiv import config as configs
from rlhf_fdiv.board import Board
from rlhf_fdiv.errors import UserError, told_as
from rlhf_fdiv.grid import Cell, grid_cells, load, phases
from rlhf_fdiv.tracking import write_atomically


@dataclass(frozen=True)
class How:
    """`jobs` cells at a time, each started by the launcher `launch` or, as AutoExecutor's `submitit` options, by a scheduler;
    with `retry` also those that failed before."""

    jobs: int = 1
    launch: str | None = None
    retry: bool = False
    submitit: dict[str, Any] | None = None


def ablate(path: Path, overrides: list[str], how: How = How()) -> bool:
    """Runs what is not finished: shared stages, then the search, then the cells. True where all of them are finished.

    A cell that fails is named, keeps its traceback in `failed.txt` and waits for `how.retry`; the rest goes on.
    """
    ablation = load(path, overrides)
    grid_cells(ablation)  # every mistake is told before anything runs
    metric = ablation.search.metric if ablation.search else ablation.report[0]
    finished = True
    for name, cells in phases(ablation):
        finished = run_cells(cells, metric, how) and finished
        if name == "shared" and not finished:
            break
    return finished


def report(path: Path, overrides: list[str]) -> Path:
    """Compares the finished cells and returns the folder that it wrote into. Raises UserError where there are none."""
    ablation = load(path, overrides)
    *_, (_, cells) = phases(ablation)
    finished = [cell.config.folder for cell in cells if cell.state == "finished"]
    if not finished:
        raise UserError(f"{ablation.folder}: no finished cell; run rlhf-fdiv ablate {path}")
    table, keys = pd.DataFrame(map(comparison.read_run, finished)), list(ablation.grid)
    claims = {m: comparison.compare(table, keys, ablation.compare_by, ablation.compare, m) for m in ablation.report}
    missing, search = [cell.name for cell in cells if cell.state != "finished"], None
    if ablation.search:
        search = vars(ablation.search) | json.loads((ablation.folder / "search.json").read_text(encoding="utf-8"))
    return _write(ablation.folder / "comparison", table, keys, claims, missing, search)


def report_runs(folders: list[Path]) -> Path:
    """The same of any runs, beside them: nothing was named before, so nothing is tested."""
    folders = [folder.resolve() for folder in folders]
    table = pd.DataFrame(map(comparison.read_run, folders))
    keys = [c.split(".")[1] for c in table if c.startswith("config.")]
    figures: dict[str, Any] = {c: [] for c in ("policy.objective", "policy.kl_reference") if c in table}
    return _write(Path(os.path.commonpath([f.parent for f in folders])) / "comparison", table, keys, figures, [], None)


def _write(out: Path, *content: Any) -> Path:
    try:
        from rlhf_fdiv import comparison_report
    except ModuleNotFoundError as error:
        raise UserError(f"rlhf-fdiv report needs {error.name}: pip install 'rlhf_fdiv[report]'") from error
    comparison_report.write_comparison(out, *content)
    return out


def commands(path: Path, overrides: list[str], launch: str | None = None) -> list[str]:
    """A command line for each run that can start now, their configs written: for xargs and job arrays.

    First the shared stages, once those are finished the search's runs, then the cells.
    """
    ablation = load(path, overrides)
    grid_cells(ablation)
    for _, cells in phases(ablation):
        if waiting := [cell for cell in cells if cell.state != "finished"]:
            return [shlex.join(_command(cell, launch)) for cell in waiting]
    return []


def run_cells(cells: list[Cell], metric: str, how: How) -> bool:
    """Runs those that are open, `how.jobs` at a time; True where all are finished in the end."""
    waiting = [cell for cell in cells if cell.state == "open" or (how.retry and cell.state == "failed")]
    running: dict[Any, Cell] = {}
    pool: Any = _executor(how) if waiting else None
    board = Board(len(waiting), metric)
    with board.drawn():
        while waiting or running:
            while waiting and len(running) < how.jobs:
                board.started(waiting[0])
                try:
                    future = pool.submit(_run_cell, waiting[0].values, configs.to_dict(waiting[0].config), how.launch)
                except BrokenProcessPool:  # by a cell that died, and whose future tells of it below
                    pool = _executor(how)
                    continue
                running[future] = waiting.pop(0)
            for future in [f for f in running if f.done()]:
                cell = running.pop(future)
                if (error := future.exception()) is not None:  # not of the cell, whose own end in failed.txt
                    cell.failure.write_text(f"its process ended: {error!r}\n", encoding="utf-8")
                board.ended(cell)
            time.sleep(0.02)
    if hasattr(pool, "shutdown"):
        pool.shutdown()
    if failed := [cell.name for cell in cells if cell.state != "finished"]:
        print(f"{len(failed)} of {len(cells)} failed; run them again with --retry: {', '.join(failed)}")
    return not failed


def _executor(how: How) -> Any:
    """Where cells run: here, in `jobs` processes that each keep what they have loaded, or wherever a scheduler puts them."""
    if how.submitit is not None:
        return _submitit(how.submitit)
    if how.jobs == 1:
        return _Here()
    if how.launch is not None:
        return ThreadPoolExecutor(how.jobs)
    threads = max(1, (os.cpu_count() or 1) // how.jobs)
    return ProcessPoolExecutor(how.jobs, get_context("spawn"), torch.set_num_threads, (threads,))


class _Here:
    """An executor whose calls have ended when `submit` returns: what stops them, such as Ctrl-C, stops the grid."""

    def submit(self, call: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*args))
        return future


def _submitit(options: dict[str, Any]) -> Any:
    # its import would configure logging anew, which closes the handlers that others have, and the streams that absl's hold
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    try:
        import submitit
    except ImportError as error:
        raise UserError("--submitit: needs the package: pip install submitit") from error
    folder, cluster = options.get("folder", "runs/submitit"), options.get("cluster")
    with told_as("--submitit", (TypeError, NameError, ValueError)):
        executor = submitit.AutoExecutor(folder, cluster=cluster)
        executor.update_parameters(**{k: v for k, v in options.items() if k not in ("folder", "cluster")})
    return executor


def _run_cell(values: dict[str, Any], raw: dict[str, Any], launch: str | None) -> None:
    """In this process, or by `launch` in others; what it says goes into `log.txt`, why it failed into `failed.txt`."""
    from rlhf_fdiv.stages.common import execute

    cell = Cell(values, configs.parse(raw))  # here, since a user's own class has its name only where its path was read
    cell.config.folder.mkdir(parents=True, exist_ok=True)
    cell.failure.unlink(missing_ok=True)
    with (cell.config.folder / "log.txt").open("a", encoding="utf-8") as log:
        if launch is not None:
            status = subprocess.run(_command(cell, launch), stdout=log, stderr=subprocess.STDOUT).returncode
            if cell.state != "finished":
                cell.failure.write_text(f"exit code {status}; see log.txt\n", encoding="utf-8")
            return
        try:
            with contextlib.redirect_stdout(log):
                execute(cell.config, cell.config.stages)
        except Exception:
            cell.failure.write_text(traceback.format_exc(), encoding="utf-8")


def _command(cell: Cell, launch: str | None) -> list[str]:
    """`LAUNCH -m rlhf_fdiv.cli run CONFIG`, and the config that it names."""
    path = cell.config.folder / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, configs.dump(cell.config))
    return [*shlex.split(launch or "python"), "-m", "rlhf_fdiv.cli", "run", str(path)]
