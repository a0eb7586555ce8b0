"""How a user's reward function is called: with what it has parameters for, awaited where it is async, or in threads."""

from __future__ import annotations

import asyncio
import atexit
import functools
import inspect
import math
import multiprocessing
import threading
from collections.abc import Callable, Mapping
from multiprocessing.pool import ThreadPool
from typing import Any

# (prompts, completions, **columns) → a number for each completion, or a function that waits for them
Score = Callable[..., Any]


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One for the whole run, in a thread of its own: clients keep to theirs, and a notebook's is busy."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # of a function written in C, which does not say
        return {"columns": inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)}


def required_columns(function: Callable[..., Any]) -> set[str]:
    """The columns of the data without which it cannot be called."""
    always = {"prompts", "completions", "completion_ids", "trainer_state"}
    needed = (
        k
        for k, x in _parameters(function).items()
        if x.default is x.empty and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
    )
    return set(needed) - always


def by_keyword(function: Callable[..., Any]) -> Score:
    """The function with what it has parameters for; an answer that must be awaited is under way when this returns."""
    known = _parameters(function)
    takes_all = any(x.kind is x.VAR_KEYWORD for x in known.values())

    async def waiting(answer: Any) -> Any:
        try:
            return await answer
        except SystemExit as error:  # which would end the loop, and the run would wait for it for ever
            raise RuntimeError(f"it called exit({error.code})") from error

    def score(**rows: Any) -> Any:
        answer = function(**{k: v for k, v in rows.items() if takes_all or k in known})
        if not inspect.isawaitable(answer):
            return answer
        return asyncio.run_coroutine_threadsafe(waiting(answer), _event_loop()).result

    return score


def in_threads(function: Score, num_workers: int, timeout: float | None) -> Score:
    """The function with a part of the completions in each of `num_workers` threads; TimeoutError after `timeout` seconds."""
    pool = ThreadPool(num_workers)  # of daemons: the process can end while one of them still waits
    atexit.register(pool.terminate)  # or its end would be told, with a traceback

    def score(**rows: Any) -> Any:
        width = math.ceil(len(rows["completions"]) / num_workers)

        def part(start: int) -> list[Any]:
            mine = {k: v[start : start + width] if isinstance(v, list) else v for k, v in rows.items()}
            try:
                values = list(collected(function(**mine)))
            except SystemExit as error:  # which would end the thread alone, and the run would wait for it for ever
                raise RuntimeError(f"it called exit({error.code})") from error
            if len(values) != len(mine["completions"]):  # two wrong parts might be right together
                raise ValueError(f"gave {len(values)} numbers for {len(mine['completions'])} completions")
            return values

        parts = pool.map_async(part, range(0, len(rows["completions"]), width), chunksize=1)

        def collect() -> list[Any]:
            try:
                return [value for values in parts.get(timeout) for value in values]
            except multiprocessing.TimeoutError:
                raise TimeoutError(f"no answer within {timeout:g} s") from None

        return collect

    return score


def collected(answer: Any) -> Any:
    """The numbers of a `Score`, waited for."""
    return answer() if callable(answer) else answer
