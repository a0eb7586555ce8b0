"""Running a grid, and comparing what came out: `rlhf-fdiv ablate` and `rlhf-fdiv report`."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import time
import traceback
from pathlib import Path

from rlhf_fdiv import comparison
from rlhf_fdiv import config as configs
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.grid import Cell, choose, grid_cells, load, search_cells, shared_cells
from rlhf_fdiv.tracking import write_atomically


def ablate(path: Path, overrides: list[str], launch: str | None = None, retry: bool = False) -> bool:
    """Runs what is not finished: shared stages, then the search, then the cells. True where all of them are finished.

    A cell that fails is named, keeps its traceback in `failed.txt` and is not tried again without `retry`; the rest goes on.
    """
    ablation = load(path, overrides)
    grid_cells(ablation)  # every mistake is told before anything runs
    chosen = None
    if not run_cells(shared_cells(ablation), launch, retry, ""):
        return False
    if ablation.search is not None:
        searched = search_cells(ablation)
        run_cells(searched, launch, retry, ablation.search.metric)
        chosen = choose(ablation, searched)
    return run_cells(grid_cells(ablation, chosen), launch, retry, ablation.search.metric if ablation.search else "")


def report(path: Path, overrides: list[str]) -> Path:
    """Compares the finished cells and returns the folder that it wrote into. Raises UserError where there are none."""
    ablation = load(path, overrides)
    chosen = choose(ablation, search_cells(ablation)) if ablation.search else None
    cells = grid_cells(ablation, chosen)
    finished = [cell.config.folder for cell in cells if cell.state == "finished"]
    if not finished:
        raise UserError(f"{ablation.folder}: no finished cell; run rlhf-fdiv ablate {path}")
    table, keys = comparison.collect(finished), list(ablation.grid)
    claims = {m: comparison.compare(table, keys, ablation.compare_by, ablation.compare, m) for m in ablation.report}
    out = ablation.folder / "comparison"
    comparison.write_comparison(out, table, keys, claims, [cell.name for cell in cells if cell.state != "finished"])
    return out


def commands(path: Path, overrides: list[str], launch: str | None = None) -> list[str]:
    """A command line for each run that can start now, their configs written: for xargs and job arrays.

    First the shared stages, once those are finished the search's runs, then the cells.
    """
    ablation = load(path, overrides)
    grid_cells(ablation)
    cells = [cell for cell in shared_cells(ablation) if cell.state != "finished"]
    if not cells and ablation.search is not None:
        cells = [cell for cell in search_cells(ablation) if cell.state != "finished"]
    if not cells:
        chosen = choose(ablation, search_cells(ablation)) if ablation.search else None
        cells = [cell for cell in grid_cells(ablation, chosen) if cell.state != "finished"]
    return [shlex.join(_command(cell, launch)) for cell in cells]


def run_cells(cells: list[Cell], launch: str | None, retry: bool, metric: str) -> bool:
    """Runs those that are open, one after the other, with a line for each; True where all are finished in the end."""
    open_cells = [cell for cell in cells if cell.state == "open" or (retry and cell.state == "failed")]
    failed = [cell for cell in cells if cell.state == "failed" and not retry]
    began = time.monotonic()
    for i, cell in enumerate(open_cells, 1):
        started = time.monotonic()
        _run_cell(cell, launch)
        seconds = time.monotonic() - started
        left = (time.monotonic() - began) / i * (len(open_cells) - i) / 60
        if cell.state == "finished":
            result = f"{metric} {cell.metric(metric):.4g}" if metric else "done"
        else:
            result = f"FAILED, {cell.failure}: {cell.failure.read_text(encoding='utf-8').strip().splitlines()[-1]}"
            failed.append(cell)
        print(f"[{i}/{len(open_cells)}] {cell.name}  {result}  {seconds:.1f} s, {left:.0f} min left", flush=True)
    if failed:
        print(
            f"{len(failed)} of {len(cells)} failed; run them again with --retry: " + ", ".join(c.name for c in failed)
        )
    return not failed


def _run_cell(cell: Cell, launch: str | None) -> None:
    """In this process, or by `launch` in others; what it says goes into `log.txt`, why it failed into `failed.txt`."""
    from rlhf_fdiv.stages.common import execute

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
