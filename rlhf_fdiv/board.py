"""What is told of the runs of a grid while they go on: a live table in a terminal, else a line for each that ends."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rlhf_fdiv.errors import UserError

if TYPE_CHECKING:
    from rlhf_fdiv.grid import Cell


class Board:
    """`started` and `ended` are told of each cell; within `drawn` a thread draws the table of those that run."""

    def __init__(self, count: int, metric: str) -> None:
        self.count, self.ended_cells, self.metric, self.began = count, 0, metric, time.monotonic()
        self.running: dict[str, tuple[Cell, float]] = {}  # and when each began
        self.console = Console()  # of the stdout of now: what a cell prints in this process goes to its log

    def drawn(self) -> Any:
        if not self.console.is_terminal:
            return nullcontext()
        return Live(console=self.console, get_renderable=self.table, refresh_per_second=1, transient=True)

    def started(self, cell: Cell) -> None:
        self.running[cell.name] = cell, time.monotonic()

    def ended(self, cell: Cell) -> None:
        """A line with its result, and with the time that the rest will take if it goes on as before."""
        result = "done"
        if cell.state != "finished":
            result = f"FAILED, {cell.failure}: {cell.failure.read_text(encoding='utf-8').strip().splitlines()[-1]}"
        elif "evaluate" in cell.config.stages:
            try:
                result = f"{self.metric} {cell.metric(self.metric):.4g}"
            except UserError as error:  # a wrong path, which the end will name; the rest goes on
                result = f"done, but {error}"
        seconds = time.monotonic() - self.running.pop(cell.name)[1]
        self.ended_cells += 1
        line = f"[{self.ended_cells}/{self.count}] {cell.name}  {result}  {seconds:.1f} s, {self._left()}"
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def table(self) -> Table:
        caption = f"{self.ended_cells} of {self.count} ended, {self._left()}"
        table = Table("cell", "stage", "progress", "minutes", caption=caption)
        for cell, began in list(self.running.values()):  # which the thread of the runs changes
            table.add_row(cell.name, *_progress(cell), f"{(time.monotonic() - began) / 60:.1f}")
        return table

    def _left(self) -> str:
        seconds = (time.monotonic() - self.began) / max(self.ended_cells, 1) * (self.count - self.ended_cells)
        return f"{seconds / 60:.0f} min left" if self.ended_cells else "time left unknown"


def _progress(cell: Cell) -> tuple[str, str]:
    """The stage that a cell is in, and how many of its steps are done."""
    stage = next((s for s in reversed(cell.config.stages) if (cell.config.folder / s).is_dir()), "")
    metrics = cell.config.folder / stage / "metrics.jsonl"
    if stage != cell.config.objective.stage or not metrics.is_file():
        return stage, ""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    steps = [json.loads(line)["step"] for line in lines[-2:] if line.endswith("\n")]  # the last may be half written
    return stage, f"{steps[-1] if steps else 0}/{cell.config.training.max_steps}"
