"""Rows of text from JSONL, JSON, Parquet, a saved `datasets` folder or a hub name, checked before any model is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fdiv.assets import toy
from rlhf_fdiv.chat import ROLES, Prompt, encode_prompts, end_id, is_chat
from rlhf_fdiv.errors import UserError, did_you_mean, told_as

PROMPTS: dict[str, type] = {"prompt": str}
COMPLETIONS: dict[str, type] = {"prompt": str, "completion": str}
PREFERENCES: dict[str, type] = {"prompt": str, "chosen": str, "rejected": str}
RATINGS: dict[str, type] = {"text": str, "rating": float}

Rows = list[dict[str, Any]]


def locate(source: str) -> str:
    """`film_reviews/…` and `toy/…` become files in the cache, made on first use; anything else stays what it is."""
    if source.startswith("toy/"):
        return str(toy() / source.removeprefix("toy/"))
    if source.startswith("film_reviews/"):
        from rlhf_fdiv.film_reviews import build

        return str(build() / source.removeprefix("film_reviews/"))
    return source


def read_rows(source: str, needs: dict[str, type], limit: int | None = None) -> Rows:
    """All rows of `source`, or the first `limit`; each has the fields of `needs` with the right type and no empty text.

    A prompt may be messages in place of text, in all rows or in none; a completion of one message is its content. Raises
    UserError that names the file and the rows, at most five of them, and the mend.
    """
    rows: Rows = []
    problems: list[str] = []
    for number, row in enumerate(_raw_rows(source), 1):
        problems += [f"{source}, row {number}: {p}" for p in _row_problems(row, needs)]
        if len(problems) >= 5:
            raise UserError(*problems[:5], f"{source}: stopped after five problems")
        rows.append(row)
        if len(rows) == limit:
            break
    if problems:
        raise UserError(*problems)
    if not rows:
        raise UserError(f"{source}: no rows; a split must have at least one")
    kinds = [is_chat([row["prompt"]]) for row in rows] if "prompt" in needs else [False]
    if (other := not kinds[0]) in kinds:
        raise UserError(
            f"{source}, row {kinds.index(other) + 1}: its prompt is {'messages' if other else 'text'} and those before are "
            "not; a file holds one kind"
        )
    texts = needs.keys() - {"prompt"}
    return [{k: v[0]["content"] if k in texts and isinstance(v, list) else v for k, v in row.items()} for row in rows]


def _raw_rows(source: str) -> Iterable[Any]:
    """What stands in each row; a UserError in place of a line that cannot be read."""
    path = Path(locate(source))
    if os.path.isfile(path):
        if path.suffix not in _READERS:
            raise UserError(f"{source}: unknown kind of file {path.suffix!r}; use .jsonl, .json or .parquet")
        kind, read = _READERS[path.suffix]
    elif os.path.isdir(path):
        kind, read = "a folder that `Dataset.save_to_disk` wrote", _folder
    elif source.startswith(("film_reviews/", "toy/")):
        there = [p.name for p in path.parent.glob("*.jsonl")]
        raise UserError(f"{source}: no such file{did_you_mean(path.name, there)}")
    elif path.suffix in _READERS or source.count("/") != 1 or source.startswith((".", "/")):
        raise UserError(f"{source}: no such file or folder")
    else:
        kind, read = "a file here or a dataset of the hub", _hub
    with told_as(f"{source}: not readable as {kind}"):  # what pyarrow and the hub raise is of many kinds
        return read(str(path))


def _json_lines(path: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        for line in file:
            try:
                if text := line.decode("utf-8-sig").strip():
                    yield json.loads(text)
            except UnicodeDecodeError as error:
                yield UserError(f"not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8")
            except (ValueError, RecursionError) as error:
                yield UserError(f"not JSON: {error}; each line is a whole row")


def _json_list(path: str) -> list[Any]:
    rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError(f"it must hold a list of objects, not {type(rows).__name__}; or use .jsonl")
    return rows


def _parquet(path: str) -> Rows:
    from pyarrow.parquet import read_table

    return read_table(path).to_pylist()


def _folder(path: str) -> Iterable[Any]:
    from datasets import Dataset, load_from_disk

    try:
        data = load_from_disk(path)
    except IndexError:
        return []  # how `datasets` reads a saved split without rows
    if not isinstance(data, Dataset):
        raise ValueError(f"it holds several splits; name one, for example {path}/{next(iter(data), 'train')}")
    return data


def _hub(name: str) -> Iterable[Any]:
    from datasets import load_dataset

    name, _, split = name.partition(":")
    return load_dataset(name, split=split or "train")


_READERS: dict[str, tuple[str, Callable[[str], Iterable[Any]]]] = {
    ".jsonl": ("UTF-8 JSON lines", _json_lines),
    ".json": ("UTF-8 JSON", _json_list),
    ".parquet": ("Parquet", _parquet),
    ".pq": ("Parquet", _parquet),
}


def _row_problems(row: Any, needs: dict[str, type]) -> Iterator[str]:
    if not isinstance(row, dict):
        mend = "; a list of rows goes into a .json file" if isinstance(row, list) else ""
        yield str(row) if isinstance(row, UserError) else f"a JSON {type(row).__name__}, not an object{mend}"
        return
    for key, kind in needs.items():
        value = row.get(key)
        if key not in row:
            yield f"no field {key!r}{did_you_mean(key, map(str, row))}"
        elif value is None:
            yield f"field {key!r} is null"
        elif kind is float:
            if not _is_number(value, -sys.float_info.max, sys.float_info.max):
                yield f"field {key!r} must be a number, not {value!r}"
        elif isinstance(value, list) and key != "text":
            yield from (f"field {key!r}{problem}" for problem in _message_problems(value, key == "prompt"))
        elif problem := _text_problem(value):
            yield f"field {key!r} {problem}"
    share = row.get("preference")
    if "chosen" in needs and share is not None and not _is_number(share, 0, 1):
        yield f"field 'preference' must lie in [0, 1], the share of raters who prefer 'chosen', not {share!r}"


def _text_problem(value: Any) -> str:
    if not isinstance(value, str):
        return f"must be text, not {type(value).__name__}"
    if not value.strip():
        return "is empty"
    found = re.search("[\ud800-\udfff]", value)
    return f"holds a lone surrogate (\\u{ord(found[0]):04x}), which is not text" if found else ""


def _message_problems(messages: list[Any], is_prompt: bool) -> Iterator[str]:
    for i, message in enumerate(messages, 1):
        where = f", message {i}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            yield f'{where}: must be like {{"role": "user", "content": "…"}}, not {message!r:.80}'
        elif message["role"] not in ROLES:
            role, known = message["role"], ", ".join(ROLES)
            yield f"{where}: role {role!r} is none of {known}{did_you_mean(str(role), ROLES)}"
        elif problem := _text_problem(message["content"]):
            yield f"{where}: its content {problem}"
        elif not is_prompt and (message["role"] != "assistant" or len(messages) > 1):
            yield " must be text or one message of the assistant; what comes before it belongs to 'prompt'"
            return
        elif is_prompt and message["role"] == "assistant" and i == len(messages):
            yield f"{where}: a prompt ends with what is to be answered, not with the assistant's answer"
    if not messages:
        yield " is empty"


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def rater_shares(rows: Rows) -> Tensor:
    """The share of raters who prefer `chosen`, 1 where a row says nothing; [N]."""
    return torch.tensor([float(1.0 if row.get("preference") is None else row["preference"]) for row in rows])


def extra_columns(rows: Rows) -> dict[str, list[Any]]:
    """What all rows have beside their prompt, by column, as scorers take it."""
    return {k: [row[k] for row in rows] for k in rows[0] if k != "prompt" and all(k in row for row in rows)}


def have_references(rows: Rows) -> bool:
    """Whether every row has a list of `references`, of texts: any other is a reward function's own affair."""
    found = [row.get("references") for row in rows]
    return all(isinstance(x, list) and x and all(isinstance(text, str) for text in x) for x in found)


def reference_texts(rows: Rows, sft_eval: str | None, limit: int | None = None) -> Rows:
    """Held-out texts as `prompt, completion`: the rows' own references, or the first of `sft_eval`; none without either."""
    if have_references(rows):
        return [{"prompt": row["prompt"], "completion": text} for row in rows for text in row["references"]]
    return read_rows(sft_eval, COMPLETIONS, limit) if sft_eval else []


def file_hash(source: str) -> str:
    """sha256 of a data file, for the manifest; empty for folders and hub names."""
    path = Path(locate(source))
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def tokenize_prompts(rows: Rows, tokenizer: Any, source: str, room: int) -> list[list[int]]:
    """Token ids of each row's prompt. Raises UserError for a prompt of more than `room` tokens (context less completion)."""
    try:
        ids = encode_prompts([row["prompt"] for row in rows], tokenizer)
    except UserError as error:
        raise UserError(*(f"{source}: {p}" for p in error.problems)) from error
    problems = []
    for i, x in enumerate(ids, 1):
        if not x:
            problems.append(f"{source}, row {i}: the prompt has no tokens")
        elif len(x) > room:
            problems.append(
                f"{source}, row {i}: the prompt has {len(x)} tokens; the model's context leaves room for {room}: "
                "shorten it, or lower max_completion_length"
            )
    if problems:
        raise UserError(*problems[:5])
    return ids


def tokenize_completions(prompts: list[Prompt], texts: list[str], tokenizer: Any, length: int) -> list[list[int]]:
    """Token ids of the completions of prompts, each with the token that ends it (EOS, behind messages the end of a turn), or
    cut at `length` tokens without one, as a rollout would be."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[*x, end_id(prompts, tokenizer)][:length] for x in ids]
