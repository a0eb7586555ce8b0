"""SIGTERM and SIGUSR1 of a scheduler: the step ends, a checkpoint is saved, and the process exits with STOPPED_EXIT_CODE."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback

STOPPED_EXIT_CODE = 75  # sysexits.h: a temporary failure; the same command goes on from the checkpoint

_asked = threading.Event()


def stop(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(STOPPED_EXIT_CODE)


@contextlib.contextmanager
def noticed(between_steps: bool) -> Iterator[None]:
    """Takes the signals while a stage runs: to stop it after a step, or at once where it has none. One that comes after the
    last step lets the stage end, and ends the process then."""

    def ask(number: int, frame: Any) -> None:
        _asked.set()
        if not between_steps:
            stop(f"stopped by {signal.Signals(number).name}; the same command begins this stage anew")

    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
        if _asked.is_set():
            stop("stopped by a signal after the last step of a stage; the same command goes on with the next")
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def asked() -> bool:
    """Whether any process was told to stop; to be asked by all of them together, so that all leave after the same step."""
    state = PartialState()
    return bool(reduce(torch.tensor(float(_asked.is_set()), device=state.device)) > 0)


class StopCallback(TrainerCallback):
    """The same for a TRL trainer; `stopped` says that it ended for that reason."""

    stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if asked():
            self.stopped = control.should_save = control.should_training_stop = True
