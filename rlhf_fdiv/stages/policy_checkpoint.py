"""Checkpoints of the policy stage: what is trained, optimiser, scheduler, random states, step and log Z."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from rlhf_fdiv.errors import UserError
from rlhf_fdiv.targets import LogPartition
from rlhf_fdiv.tracking import newest_checkpoint, prune_checkpoints


def _only_trained(accelerator: Accelerator, policy: Any) -> None:
    """Keeps frozen weights out of checkpoints: the reference they belong to is read from where it was, never re-anchored."""
    trained = {name for name, p in accelerator.unwrap_model(policy).named_parameters() if p.requires_grad}

    def drop_frozen(models: list[Any], weights: list[dict[str, Any]], folder: str) -> None:
        for state in weights:
            for name in [n for n in state if n.removeprefix("module.") not in trained]:
                del state[name]

    accelerator.register_save_state_pre_hook(drop_frozen)


def save(
    out: Path,
    step: int,
    accelerator: Accelerator,
    policy: Any,
    optimizer: Any,
    scheduler: Any,
    log_partition: LogPartition,
    keep: int,
) -> None:
    """Writes `checkpoint-<step>` aside and renames it, so that a checkpoint is whole or absent."""
    part = out / f".checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    if accelerator.is_main_process:
        state = {"step": step, "scheduler": scheduler.state_dict(), "log_partition": log_partition.state_dict()}
        (part / "policy_state.json").write_text(json.dumps(state), encoding="utf-8")
        os.replace(part, out / f"checkpoint-{step}")
        prune_checkpoints(out, keep)
    accelerator.wait_for_everyone()


def restore(
    out: Path, accelerator: Accelerator, policy: Any, optimizer: Any, scheduler: Any, log_partition: LogPartition
) -> int:
    """Loads the newest checkpoint of `out`, if there is one, and returns its step."""
    _only_trained(accelerator, policy)
    newest = newest_checkpoint(out)
    if newest is None:
        return 0
    try:
        state = json.loads((newest / "policy_state.json").read_text(encoding="utf-8"))
        accelerator.load_state(str(newest), strict=False)
    except Exception as error:
        raise UserError(f"{newest}: damaged checkpoint ({error}); remove it to go on from the one before") from error
    scheduler.load_state_dict(state["scheduler"])
    log_partition.load_state_dict(state["log_partition"])
    accelerator.print(f"resumed from {newest}")
    return int(state["step"])
