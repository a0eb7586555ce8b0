"""Which checkpoints of a folder are whole: each is written aside and renamed, with a checksum of every file."""

from __future__ import annotations

import itertools
import json
import shutil
import zlib
from pathlib import Path

STATE, TRAINER_STATE = "policy_state.json", "trainer_state.json"  # ours; of a TRL trainer, which writes it last


def checkpoints(folder: Path) -> list[Path]:
    """Every complete `checkpoint-N`, the newest last."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit() and _complete(p)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _complete(checkpoint: Path) -> bool:
    if (checkpoint / STATE).is_file():
        return True
    try:
        return bool(json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def newest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(checkpoints(folder)), None)


def what_is_kept(folder: Path) -> str:
    """The end of a message: where a stage that was stopped goes on."""
    last = newest_checkpoint(folder)
    if last is None:
        return "There is no checkpoint yet: the same command begins this stage anew"
    return f"{last} is intact, and the same command goes on from it"


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Deletes all but the `keep` newest, at least one."""
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file by name, but for the one that will hold them."""
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != STATE):
        name = path.relative_to(folder).as_posix()
        sums[name] = 0
        with path.open("rb") as file:
            while block := file.read(2**24):
                sums[name] = zlib.crc32(block, sums[name])
    return sums


def require_whole(checkpoint: Path) -> None:
    """Raises ValueError where a file of a checkpoint of ours is not as it was written."""
    written = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("files", {})
    found = checksums(checkpoint) if written else {}
    if changed := [name for name in written if found.get(name) != written[name]]:
        raise ValueError(f"{', '.join(changed)} not as it was written")


def set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint that cannot be read, so that another can be written in its place."""
    names = (f"damaged-{checkpoint.name}" + (f".{n}" if n else "") for n in itertools.count())
    free = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    return checkpoint.rename(free)
