"""What is told of the runs of a grid while they go on: a live table in a terminal, else a line for each that ends."""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rlhf_fdiv.errors import UserError

if TYPE_CHECKING:
    from rlhf_fdiv.grid import Cell


class Board:
    """`started` and `ended` are told of each cell; within `with` a thread draws the table of those that run."""

    def __init__(self, cells: list[Cell], metric: str) -> None:
        self.cells, self.metric, self.began = cells, metric, time.monotonic()
        self.started_at: dict[str, float] = {}
        self.results: dict[str, str] = {}
        self.console = Console()  # of the stdout of now: what a cell prints in this process goes to its log
        self.live = Live(console=self.console, get_renderable=self._table, refresh_per_second=1, transient=True)

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def started(self, cell: Cell) -> None:
        self.started_at[cell.name] = time.monotonic()

    def ended(self, cell: Cell) -> None:
        """A line with its result, and with the time that the rest will take if it goes on as before."""
        result = "done"
        if cell.state != "finished":
            result = f"FAILED, {cell.failure}: {cell.failure.read_text(encoding='utf-8').strip().splitlines()[-1]}"
        elif self.metric and "evaluate" in cell.config.stages:
            try:
                result = f"{cell.own(self.metric)} {cell.metric(self.metric):.4g}"
            except UserError as error:  # a wrong path, which the end will name; the rest goes on
                result = f"done, but {error}"
        seconds = time.monotonic() - self.started_at.pop(cell.name)
        self.results[cell.name] = result
        line = f"[{len(self.results)}/{len(self.cells)}] {cell.name}  {result}  {seconds:.1f} s, {self._left():.0f} min left"
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _table(self) -> Table:
        table = Table("cell", "stage", "progress", "minutes", caption=f"{len(self.results)} of {len(self.cells)} ended, "
                      f"about {self._left():.0f} min left")  # fmt: skip
        for cell in self.cells:
            if (began := self.started_at.get(cell.name)) is not None:
                table.add_row(cell.name, *_progress(cell), f"{(time.monotonic() - began) / 60:.1f}")
        return table

    def _left(self) -> float:
        ended = len(self.results)
        return (time.monotonic() - self.began) / ended * (len(self.cells) - ended) / 60 if ended else float("nan")


def _progress(cell: Cell) -> tuple[str, str]:
    """The stage that a cell is in, and how many of its steps are done."""
    stage = next((s for s in reversed(cell.config.stages) if (cell.config.folder / s).is_dir()), "")
    metrics = cell.config.folder / stage / "metrics.jsonl"
    if stage != cell.config.objective.stage or not metrics.is_file():
        return stage, ""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    steps = [json.loads(line)["step"] for line in lines[-2:] if line.endswith("\n")]  # the last may be half written
    return stage, f"{steps[-1] if steps else 0}/{cell.config.training.max_steps}"
