"""Checkpoints of a training loop: written aside, sealed with checksums, renamed; the newest whole one is read."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from rlhf_fdiv.checkpoints import (
    STATE,
    checkpoints,
    checksums,
    prune_checkpoints,
    require_whole,
    set_aside,
    step_of,
    what_is_kept,
)
from rlhf_fdiv.errors import UserError


class Checkpoints:
    """Those in `out` of a wrapped policy, its optimiser and random streams, and of `state`: name → an object with
    `state_dict` and `load_state_dict`. Every method is called by all processes together."""

    def __init__(self, out: Path, accelerator: Accelerator, policy: Any, state: dict[str, Any]) -> None:
        self.out, self.accelerator, self.state = out, accelerator, state
        named = accelerator.unwrap_model(policy).named_parameters()
        trained = {name for name, p in named if p.requires_grad}

        def drop_frozen(models: list[Any], weights: list[dict[str, Any]], folder: str) -> None:
            """The reference they belong to is read from where it was, never re-anchored."""
            for kept in weights:
                for name in [n for n in kept if n.removeprefix("module.") not in trained]:
                    del kept[name]

        accelerator.register_save_state_pre_hook(drop_frozen)

    def save(self, step: int, keep: int) -> None:
        """`checkpoint-<step>`, whole or absent; the `keep` newest stay. Raises UserError where it cannot be written."""
        part = self.out / f".checkpoint-{step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        save = functools.partial(self.accelerator.save_state, str(part), exclude_frozen_parameters=True)  # DeepSpeed's
        if problem := self._together(save) or self._together(self._seal, part, step):
            raise UserError(f"step {step}: the checkpoint cannot be written: {problem}. {what_is_kept(self.out)}")
        if self.accelerator.is_main_process:
            whole = self.out / f"checkpoint-{step}"
            if whole.exists():  # not a checkpoint, or the run would have gone on from it
                set_aside(whole)
            os.replace(part, whole)
            prune_checkpoints(self.out, keep)
        self.accelerator.wait_for_everyone()

    def restore(self) -> int:
        """Loads the newest checkpoint that is whole, if there is one, and returns its step; 0 without any.

        A damaged one is named, set aside, and the one before it taken. Raises UserError where none is left.
        """
        tried: list[Path] = []
        for checkpoint in reversed(checkpoints(self.out)):
            problem = self._together(self._check, checkpoint) or self._together(self._load, checkpoint)
            if not problem:
                self.accelerator.print(f"resumed from {checkpoint}")
                return step_of(checkpoint)
            tried.append(set_aside(checkpoint) if self.accelerator.is_main_process else checkpoint)
            self.accelerator.print(f"warning: {checkpoint} is damaged ({problem}); it is now {tried[-1].name}")
            self.accelerator.wait_for_everyone()
        if tried:
            raise UserError(
                f"{self.out}: none of its checkpoints can be read; they are kept as {', '.join(p.name for p in tried)}. "
                "Without them the stage would start anew: run it again to do that"
            )
        return 0

    def _seal(self, part: Path, step: int) -> None:
        """What is not of one process alone, and the checksums of all."""
        if self.accelerator.is_main_process:
            state = {"step": step, **{name: x.state_dict() for name, x in self.state.items()}, "files": checksums(part)}
            (part / STATE).write_text(json.dumps(state), encoding="utf-8")

    def _check(self, checkpoint: Path) -> None:
        if self.accelerator.is_main_process:
            require_whole(checkpoint)

    def _load(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            with no_code():
                self.accelerator.load_state(str(checkpoint), load_module_strict=False)
        else:
            self.accelerator.load_state(str(checkpoint), strict=False)
        for name, x in self.state.items():
            x.load_state_dict(state[name])

    def _together(self, action: Callable[..., None], *args: Any) -> str:
        """Does something with files; what went wrong there with any process, in words, told to all of them."""
        problem = ""
        try:
            action(*args)
        except UserError:
            raise
        except Exception as error:  # of the file system, safetensors, torch or JSON
            problem = f"{type(error).__name__}: {error}"
        return next(filter(None, gather_object([problem])), "")


@contextlib.contextmanager
def no_code() -> Iterator[None]:
    """DeepSpeed would run whatever code its pickles hold; within this they hold tensors and these classes, or fail."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
