"""Rows of text from JSONL, JSON, Parquet, a saved `datasets` folder or a hub name, checked before any model is loaded."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fdiv.errors import UserError, did_you_mean

PROMPTS: dict[str, type] = {"prompt": str}
COMPLETIONS: dict[str, type] = {"prompt": str, "completion": str}
PREFERENCES: dict[str, type] = {"prompt": str, "chosen": str, "rejected": str}
RATINGS: dict[str, type] = {"text": str, "rating": float}

Rows = list[dict[str, Any]]
_LARGEST = sys.float_info.max


def locate(source: str) -> str:
    """`film_reviews/…` becomes a file in the cache, made on first use; anything else stays what it is."""
    if source.startswith("film_reviews/"):
        from rlhf_fdiv.film_reviews import build

        return str(build() / source.removeprefix("film_reviews/"))
    return source


def read_rows(source: str, needs: dict[str, type], limit: int | None = None) -> Rows:
    """All rows of `source`, or the first `limit`; each has the fields of `needs` with the right type and no empty text.

    Raises UserError that names the file and the rows, at most five of them, and the mend.
    """
    path = Path(locate(source))
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no file can have this name: {error}") from error
    rows: Rows = []
    problems: list[str] = []
    for number, row in _numbered(path, source):
        if isinstance(row, str):
            problems.append(f"{source}, row {number}: {row}")
        else:
            problems += [f"{source}, row {number}: {p}" for p in _row_problems(row, needs)]
        if len(problems) >= 5:
            raise UserError(*problems[:5], f"{source}: stopped after five problems")
        rows.append(row if isinstance(row, dict) else {})
        if limit is not None and len(rows) == limit:
            break
    if problems:
        raise UserError(*problems)
    if not rows:
        raise UserError(f"{source}: no rows; a split must have at least one")
    return rows


def _numbered(path: Path, source: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Row numbers from 1 and rows, or a sentence where a row cannot be read."""
    if path.suffix == ".jsonl" and path.is_file():
        return _jsonl(path)
    if path.is_file():
        if path.suffix == ".json":
            return enumerate(_json_list(path, source), 1)
        if path.suffix in (".parquet", ".pq"):
            import pyarrow.parquet as pq

            try:
                return enumerate(pq.read_table(path).to_pylist(), 1)
            except Exception as error:
                raise UserError(f"{source}: not a readable Parquet file: {error}") from error
        raise UserError(f"{source}: unknown kind of file {path.suffix!r}; use .jsonl, .json or .parquet")
    if path.is_dir():
        from datasets import Dataset, load_from_disk

        try:
            data = load_from_disk(str(path))
        except IndexError:
            return iter(())  # how `datasets` reads a saved split without rows
        except Exception as error:
            raise UserError(f"{source}: a folder, but not one that `Dataset.save_to_disk` wrote") from error
        if not isinstance(data, Dataset):
            raise UserError(
                f"{source}: holds several splits; name one, for example {source}/{next(iter(data), 'train')}"
            )
        return ((i, dict(row)) for i, row in enumerate(data, 1))
    if source.startswith("film_reviews/"):
        raise UserError(
            f"{source}: no such file{did_you_mean(path.name, (p.name for p in path.parent.glob('*.jsonl')))}"
        )
    if path.suffix in (".jsonl", ".json", ".parquet", ".pq") or source.count("/") != 1 or source.startswith((".", "/")):
        raise UserError(f"{source}: no such file or folder")
    return _hub(source)


def _hub(source: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        data = load_dataset(name, split=split or "train")
    except Exception as error:
        raise UserError(f"{source}: neither a file here nor a dataset that could be loaded: {error}") from error
    return ((i, dict(row)) for i, row in enumerate(data, 1))


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    number, encoding = 0, "utf-8-sig"
    with path.open("rb") as file:
        for line in file:
            number += bool(line.strip())
            try:
                text = line.decode(encoding).strip()
            except UnicodeDecodeError as error:
                yield number, f"not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
                continue
            encoding = "utf-8"
            if not text:
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield number, f"not JSON: {error}"
                continue
            yield number, row if isinstance(row, dict) else f"a JSON {type(row).__name__}, not an object"


def _json_list(path: Path, source: str) -> list[dict[str, Any] | str]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not UTF-8 JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{source}: must hold a list of objects, not {type(rows).__name__}; or use .jsonl")
    return [row if isinstance(row, dict) else f"a JSON {type(row).__name__}, not an object" for row in rows]


def _row_problems(row: dict[str, Any], needs: dict[str, type]) -> Iterator[str]:
    for key, kind in needs.items():
        if key in row and row[key] is None:
            yield f"field {key!r} is null"
        elif key not in row:
            yield f"no field {key!r}{did_you_mean(key, map(str, row))}"
        elif kind is float:
            if isinstance(row[key], bool) or not isinstance(row[key], int | float) or not abs(row[key]) <= _LARGEST:
                yield f"field {key!r} must be a number, not {row[key]!r}"
        elif not isinstance(row[key], str):
            yield f"field {key!r} must be text, not {type(row[key]).__name__}"
        elif not row[key].strip():
            yield f"field {key!r} is empty"
        elif not row[key].isascii() and (bad := _surrogate(row[key])):
            yield f"field {key!r} holds a lone surrogate ({bad}), which is not text"
    share = row.get("preference")
    if (
        share is not None
        and "chosen" in needs
        and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1)
    ):
        yield f"field 'preference' must lie in [0, 1], the share of raters who prefer 'chosen', not {share!r}"


def _surrogate(text: str) -> str:
    return next((f"\\u{ord(c):04x}" for c in text if 0xD800 <= ord(c) <= 0xDFFF), "")


def rater_shares(rows: Rows) -> Tensor:
    """The share of raters who prefer `chosen`, 1 where a row says nothing; [N]."""
    return torch.tensor([float(1.0 if row.get("preference") is None else row["preference"]) for row in rows])


def extra_columns(rows: Rows) -> dict[str, list[Any]]:
    """What all rows have beside their prompt, by column, as scorers take it."""
    return {k: [row[k] for row in rows] for k in rows[0] if k != "prompt" and all(k in row for row in rows)}


def file_hash(source: str) -> str:
    """sha256 of a data file, for the manifest; empty for folders and hub names."""
    path = Path(locate(source))
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def tokenize_prompts(rows: Rows, tokenizer: Any, source: str, room: int) -> list[list[int]]:
    """Token ids of each row's prompt. Raises UserError for a prompt of more than `room` tokens (context less completion)."""
    ids = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    problems = [
        f"{source}, row {i}: the prompt has {len(x)} tokens; the model's context leaves room for {room}"
        for i, x in enumerate(ids, 1)
        if len(x) > room
    ] + [f"{source}, row {i}: the prompt has no tokens" for i, x in enumerate(ids, 1) if not x]
    if problems:
        raise UserError(*problems[:5])
    return ids


def tokenize_completions(texts: list[str], tokenizer: Any, length: int) -> list[list[int]]:
    """Token ids of completions, each with its EOS, or cut at `length` tokens without one, as a rollout would be."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[*x, tokenizer.eos_token_id][:length] for x in ids]
