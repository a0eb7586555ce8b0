"""Rows from files: what is read is what was written, and what cannot be read is named by file, row and field."""

import hashlib
import json

import datasets
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from rlhf_fdiv import film_reviews
from rlhf_fdiv.data import (
    COMPLETIONS,
    PREFERENCES,
    PROMPTS,
    RATINGS,
    file_hash,
    have_references,
    read_rows,
    tokenize_prompts,
)
from rlhf_fdiv.errors import UserError, did_you_mean

ROWS = [
    {
        "prompt": "a",
        "chosen": " x",
        "rejected": " y",
        "preference": None,
        "rating": 1.5,
        "references": ["p", "q"],
        "n": 1,
    },
    {"prompt": "b\n", "chosen": "é", "rejected": "模", "preference": 0.5, "rating": -2.0, "references": [], "n": None},
]


@pytest.fixture
def write(tmp_path):
    def write(content, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def problems(source: str, needs=PROMPTS, limit=None) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        read_rows(source, needs, limit)
    assert all(p.startswith(source) for p in caught.value.problems)
    return tuple(p.removeprefix(source) for p in caught.value.problems)


# what can be read


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "pq", "folder", "split"])
def test_every_kind_of_file_gives_the_same_rows(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind in ("parquet", "pq"):
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "folder":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)
        path /= "train"
    assert read_rows(str(path), PREFERENCES) == ROWS
    assert read_rows(str(path), PROMPTS, limit=1) == ROWS[:1]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [b"", b"END", b"ENDENDEND"])
def test_byte_order_mark_line_ends_and_blank_lines_change_nothing(write, end, mark, last):
    content = mark + end.join([b'{"prompt": "a"}', b"", b" \t", b'{"prompt": "b"}']) + last.replace(b"END", end)
    assert read_rows(write(content), PROMPTS) == [{"prompt": "a"}, {"prompt": "b"}]
    assert read_rows(write(mark + b'[{"prompt": "a"}]', "rows.json"), PROMPTS) == [{"prompt": "a"}]


TEXTS = [
    "\x00\x07\x1b[31m",
    "中文。",
    "\u202e\u2066abc",
    "عربي עברית",
    "😀👩‍👩‍👧",
    "a\u2028b\u2029c\x85d",
    "e\u0301",
    "\ufeffa",
    " a ",
    "\t.\n",
]


@pytest.mark.parametrize("escaped", [True, False])
def test_any_text_is_kept_as_it_is(write, escaped):
    content = "\n".join(json.dumps({"prompt": text}, ensure_ascii=escaped) for text in TEXTS)
    assert [row["prompt"] for row in read_rows(write(content), PROMPTS)] == TEXTS
    pd.DataFrame({"prompt": TEXTS}).to_parquet(path := write("", "texts.parquet"))
    assert [row["prompt"] for row in read_rows(path, PROMPTS)] == TEXTS


def test_a_line_of_ten_megabytes_is_a_row(write):
    text = "wörd " * 2_000_000
    assert read_rows(write(json.dumps({"prompt": text}, ensure_ascii=False)), PROMPTS) == [{"prompt": text}]


def test_limit_takes_the_first_rows_and_reads_no_further(write):
    source = write([{"prompt": "a"}, {"prompt": "b"}, "no JSON"])
    assert read_rows(source, PROMPTS, limit=2) == [{"prompt": "a"}, {"prompt": "b"}]
    assert len(problems(source, limit=3)) == 1


@pytest.mark.parametrize("preference", [0, 1, 0.25, None])
def test_a_preference_is_a_share_or_absent(write, preference):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "preference": preference}
    assert read_rows(write([row]), PREFERENCES) == [row]


@pytest.mark.parametrize("rating", [0, -3, 2.5])
def test_a_rating_is_any_number(write, rating):
    assert read_rows(write([{"text": "a", "rating": rating}]), RATINGS)[0]["rating"] == rating


@pytest.mark.parametrize("source", ["org/data", "org/data:test", "org/data-v1.1", "org/data_v1.1:test"])
def test_a_hub_name_is_loaded_with_its_split(source, monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows(source, PROMPTS) == [{"prompt": "a"}]
    assert asked == [(source.partition(":")[0], source.partition(":")[2] or "train")]


def test_a_hub_that_cannot_be_reached_is_one_message(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "no network" in problems("org/data")[0]


# what cannot


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"prompt": "a\xff"}', ["row 2", "UTF-8", "byte 13"]),
        (b"\x80", ["row 2", "UTF-8", "byte 0"]),
        (b"no JSON", ["row 2", "JSON"]),
        (b'{"prompt": "a"', ["row 2", "JSON"]),
        (b'{"prompt": "a"}{"prompt": "b"}', ["row 2", "JSON"]),
        (b"{'prompt': 'a'}", ["row 2", "JSON"]),
        (b"\x00", ["row 2", "JSON"]),
        (b"[" * 100_000, ["row 2", "JSON"]),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", ["row 2", "JSON"]),
        (b'["prompt"]', ["row 2", "list", "object"]),
        (b'"prompt"', ["row 2", "object"]),
        (b"null", ["row 2", "object"]),
        (b"3", ["row 2", "object"]),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_row_that_is_no_object_is_named(write, line, parts):
    (message,) = problems(write(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n'))
    assert message.startswith(f", {parts[0]}: ")
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("row", "needs", "part"),
    [
        ({"promt": "a"}, PROMPTS, "no field 'prompt'; did you mean 'promt'?"),
        ({"text": "a", "label": 1}, PROMPTS, "no field 'prompt'; known: text, label"),
        ({"prompt": "a", "Completion": "b"}, COMPLETIONS, "did you mean 'Completion'?"),
        ({"prompt": 3}, PROMPTS, "field 'prompt' must be text, not int"),
        ({"prompt": {"role": "user", "content": "a"}}, PROMPTS, "field 'prompt' must be text, not dict"),
        ({"text": [{"role": "user", "content": "a"}], "rating": 1}, RATINGS, "field 'text' must be text, not list"),
        ({"prompt": float("nan")}, PROMPTS, "field 'prompt' must be text"),
        ({"prompt": ""}, PROMPTS, "field 'prompt' is empty"),
        ({"prompt": " \n\t\u3000\u2028"}, PROMPTS, "field 'prompt' is empty"),
        ({"prompt": "a\ud800b"}, PROMPTS, "field 'prompt' holds a lone surrogate (\\ud800)"),
        ({"prompt": "\udc00 中"}, PROMPTS, "field 'prompt' holds a lone surrogate (\\udc00)"),
        ({"prompt": "a", "completion": ""}, COMPLETIONS, "field 'completion' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, PREFERENCES, "field 'rejected' must be text"),
        *(
            ({"text": "a", "rating": rating}, RATINGS, "field 'rating' must be a number")
            for rating in ("3", True, [1], float("nan"), float("inf"), float("-inf"), 10**400)
        ),
        *(
            ({"prompt": "a", "chosen": "b", "rejected": "c", "preference": share}, PREFERENCES, "field 'preference'")
            for share in (1.2, -0.1, "0.5", True, [1], float("nan"), float("inf"))
        ),
    ],
    ids=lambda x: str(x)[:60],
)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_field_that_is_missing_or_wrong_is_named(write, kind, row, needs, part):
    good = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d", "text": "e", "rating": 1}
    content = [good, row] if kind == "jsonl" else json.dumps([good, row])
    (message,) = problems(write(content, f"rows.{kind}"), needs)
    assert message.startswith(", row 2: ")
    assert part in message


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_null_is_called_null_and_not_a_misspelling(write, kind):
    rows = [{"text": "a", "rating": 1.0}, {"text": None, "rating": None}]
    source = write(rows, "rows.jsonl")
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(source := source.replace("jsonl", "parquet"))
    for message, field in zip(problems(source, RATINGS), ("text", "rating"), strict=True):
        assert message.startswith(", row 2: ")
        assert repr(field) in message
        assert "null" in message or "None" in message
        assert "did you mean" not in message


def test_an_empty_object_has_no_dangling_list_of_known_fields(write):
    assert not problems(write(["{}"]))[0].rstrip().endswith(":")


@pytest.mark.parametrize("content", ["", "\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(write, content):
    assert "no rows" in problems(write(content))[0]


@pytest.mark.parametrize("kind", ["json", "parquet", "folder"])
def test_an_empty_split_is_an_error_in_every_kind_of_file(tmp_path, kind):
    path, empty = tmp_path / f"rows.{kind}", datasets.Dataset.from_dict({"prompt": []})
    if kind == "json":
        path.write_text("[]")
    elif kind == "parquet":
        empty.to_parquet(path)
    else:
        empty.save_to_disk(path)
    assert "no rows" in problems(str(path))[0]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("rows.txt", "a", "'.txt'"),
        ("rows.csv", "prompt\na", ".jsonl"),
        ("rows", "{}", "unknown kind"),
        ("rows.parquet", "", "Parquet"),
        ("rows.parquet", "PAR1 nothing PAR1", "Parquet"),
        ("rows.json", '{"prompt": "a"}', "list"),
        ("rows.json", "", "JSON"),
        ("rows.json", "[", "JSON"),
        ("rows.json", b"\xff", "UTF-8"),
        ("rows.json", "[" * 100_000, "JSON"),
        ("rows.json", '[{"prompt": "a", "n": ' + "9" * 5000 + "}]", "JSON"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_file_of_another_kind_is_named_with_the_mend(write, name, content, part):
    (message,) = problems(write(content, name))
    assert part in message


def test_what_is_not_there_or_no_data_is_one_message(tmp_path):
    assert "no such file" in problems(str(tmp_path / "gone.jsonl"))[0]
    assert "no such file" in problems("gone.jsonl")[0]
    assert len(problems(str(tmp_path / ("n" * 300 + ".jsonl")))) == 1
    assert len(problems("nul\0.jsonl")) == 1
    (tmp_path / "folder.jsonl").mkdir()
    assert len(problems(str(tmp_path / "folder.jsonl"))) == 1
    assert len(problems(str(tmp_path))) == 1


def test_a_folder_of_several_splits_asks_for_one(tmp_path):
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "all")
    (message,) = problems(str(tmp_path / "all"))
    assert "several splits" in message
    assert "all/dev" in message


def test_a_film_reviews_name_is_a_file_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(film_reviews, "build", lambda: tmp_path)
    (tmp_path / "sft_train.jsonl").write_text('{"prompt": "a"}')
    assert read_rows("film_reviews/sft_train.jsonl", PROMPTS) == [{"prompt": "a"}]
    assert file_hash("film_reviews/sft_train.jsonl") == file_hash(str(tmp_path / "sft_train.jsonl"))
    assert "did you mean" in problems("film_reviews/sft_trian.jsonl")[0]


def test_up_to_five_problems_are_named_at_once_and_then_it_stops(write):
    bad = ["no JSON", {"prompt": ""}, {"promt": "a"}, {"prompt": 3}]
    assert [p[:7] for p in problems(write([*bad, {"prompt": "a"}]))] == [f", row {i}" for i in (1, 2, 3, 4)]
    many = problems(write([{"prompt": ""}] * 50))
    assert len(many) == 6
    assert many[-1].startswith(": stopped after five")
    assert len(problems(write([{"x": 1}]), PREFERENCES)) == 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=20) | st.text(alphabet='{}[]":,a1\\ue.-', max_size=20).map(str.encode), max_size=3))
def test_no_content_raises_anything_but_a_user_error(tmp_path_factory, lines):
    for kind in ("jsonl", "json", "parquet"):
        path = tmp_path_factory.getbasetemp() / f"random.{kind}"
        path.write_bytes(b"\n".join(lines))
        with pytest.raises(UserError, match=f"random.{kind}"):
            read_rows(str(path), {"no such field": str})


def test_the_hash_is_the_files_sha256_and_empty_for_folders_and_hub_names(write, tmp_path):
    assert file_hash(write("abc")) == hashlib.sha256(b"abc").hexdigest()
    assert (file_hash(str(tmp_path)), file_hash("org/data"), file_hash("gone.jsonl")) == ("", "", "")


# prompts as tokens


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def test_prompts_are_the_tokenizers_own_ids(tokenizer):
    assert tokenize_prompts([{"prompt": "a b"}, {"prompt": "b c a"}], tokenizer, "rows", 3) == [[1, 2], [2, 0, 1]]


def test_a_prompt_longer_than_the_room_is_named_by_row_with_both_numbers(tokenizer):
    with pytest.raises(UserError) as caught:
        tokenize_prompts([{"prompt": p} for p in ("a", "a b a", "a b", "b b b b")], tokenizer, "rows.jsonl", 2)
    assert [p[:17] for p in caught.value.problems] == ["rows.jsonl, row 2", "rows.jsonl, row 4"]
    assert "3 tokens" in caught.value.problems[0]
    assert "room for 2" in caught.value.problems[0]


def test_a_prompt_without_tokens_is_named(tokenizer):
    with pytest.raises(UserError, match="row 2: the prompt has no tokens"):
        tokenize_prompts([{"prompt": "a"}, {"prompt": " "}], tokenizer, "rows", 9)


def test_a_row_has_the_same_number_when_it_is_read_and_when_it_is_tokenized(write, tokenizer):
    lines = ["", '{"prompt": "a"}', "", '{"prompt": "b b b"}']
    with pytest.raises(UserError) as caught:
        tokenize_prompts(read_rows(source := write(lines), PROMPTS), tokenizer, source, 2)
    (read,) = problems(write([*lines[:3], '{"prompt": ""}']))
    assert caught.value.problems[0].removeprefix(source).split(":")[0] == read.split(":")[0]


# the words of a mistake


def test_did_you_mean_names_what_is_near_else_all_that_is_known():
    assert "'learning_rate'" in did_you_mean("learning_rat", ["max_steps", "learning_rate"])
    assert did_you_mean("zzz", ["max_steps", "seed"]).endswith("known: max_steps, seed")
    assert not did_you_mean("zzz", []).rstrip().endswith(":")


def test_a_user_errors_text_is_all_its_problems():
    assert str(UserError("first", "second")) == "first\nsecond"


@pytest.mark.parametrize("references", [[3], ["a", None], "a", [], None])
def test_references_that_are_no_texts_are_none(references):
    assert not have_references([{"references": ["a"]}, {"references": references}])
    assert have_references([{"references": ["a"]}, {"references": ["b", "c"]}])
