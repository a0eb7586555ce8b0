"""Bad input through the real entry: each row of a table is a mistake (or only looks like one) and what must be said of it.

None in place of words means that it works. What one reader or scorer does with its input stands in the tests of its module.
"""
# ruff: noqa: E501 - a table reads best with one row a line

import dataclasses
import gzip
import json
import shutil
import signal
import sys

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import problems, run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_fdiv import config as configs
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.models import load_policy
from rlhf_fdiv.rewards import Function
from rlhf_fdiv.scoring import Scorers
from rlhf_fdiv.stages.inputs import check_inputs
from rlhf_fdiv.tracking import write_table


@pytest.fixture(autouse=True)
def never_a_hang():
    def stop(*args):
        raise AssertionError("a hang")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)  # of a busy machine, with the fixtures
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def base(start, data, tmp_path_factory):
    """A sound config of all stages, its target a scorer that needs no other stage."""
    folder = tmp_path_factory.mktemp("base")
    raw = tiny.raw_config(start, data, folder / "runs") | {"report_to": "none"}
    raw["target"]["reward"] = "praise"
    raw |= {"prefer": {"num_pairs": 4, "max_completion_length": 6, "max_steps": 1}}
    return tiny.write_config(folder / "base.yaml", raw)


def rows_of(table):
    return [pytest.param(*row[1:], id=row[0]) for row in table]


# -- configs, by the command line --------------------------------------------------------------------------------------


def bomb(inner, of_nine):
    return f"x0: &x0 {inner}\n" + "".join(f"x{i}: &x{i} {of_nine.format(*[f'*x{i - 1}'] * 9)}\n" for i in range(1, 12))


LISTS = bomb("[lol]", "[{}, {}, {}, {}, {}, {}, {}, {}, {}]")
CONFIGS = [  # what stands in the file below its base, overrides, what is said
    ("aliases of aliases in lists", LISTS, (), ["more than 131,072 values with what aliases repeat"]),
    ("aliases of aliases where anything may stand", "sft: {training_args: {\n" + LISTS.replace("\n", ",\n") + "}}", (), ["131,072"]),
    ("aliases of aliases in mappings", bomb("{a: 1}", "{{b: {}, c: {}, d: {}, e: {}, f: {}, g: {}, h: {}, i: {}, j: {}}}"), (), ["131,072"]),
    ("aliases of aliases in merges", bomb("{a: 1}", "{{<<: [{}, {}, {}, {}, {}, {}, {}, {}, {}]}}"), (), ["131,072"]),
    ("an alias that is used twice", "sft: &s {max_steps: 3}\nreward: *s\n", (), None),
    ("an f that is its own component", "divergence: &f {name: mixture, weights: [1], components: [*f]}", (), ["recursive"]),
    ("a file of 10 MB", f"output_dir: {'a' * 10_000_000}\n", (), ["longer than 131,072 characters", "a config at all"]),
    ("a file of data", '{"prompt": "film"}\n' * 20_000, (), ["is it a config at all"]),
    ("twenty thousand unknown keys", "".join(f"k{i}: 1\n" for i in range(20_000)), (), ["is it a config at all"]),
    ("a section given twice", "sft: {max_steps: 1}\nsft: {max_steps: 2}\n", (), ["'sft' is given twice"]),
    ("a tab", "sft:\n\tmax_steps: 1\n", (), ["not readable as YAML", "'\\t'"]),
    ("an object of Python", "name: !!python/object/apply:os.getcwd []\n", (), ["not readable as YAML", "python/object"]),
    ("an unknown tag", "name: !name x\n", (), ["!name"]),
    ("two documents", "seed: 1\n---\nseed: 2\n", (), ["not readable as YAML", "another document"]),
    ("control characters", "name: a\x07b\n", (), ["not readable as YAML", "special characters are not allowed"]),
    ("a carriage return for a line end", "seed: 1\rname: b\r", (), None),
    ("Chinese, right to left and emoji in a path", "output_dir: 'д/模型/עברית/😀'\n", (), None),
    ("Chinese in a name", "name: 模型\n", (), None),
    ("emoji in a name", "name: 😀\n", (), ["name: '😀' must be letters"]),
    ("a right-to-left mark in a name", 'name: "a\\u202eb"\n', (), ["name: ", "must be letters"]),
    ("a lone surrogate", 'output_dir: "\\ud800"\n', (), ["output_dir: "]),
    ("an empty string for a path", 'output_dir: ""\n', (), ["output_dir: ", "at least 1 character"]),
    ("a key that is no text", "3: 1\n", (), ["3: unknown key"]),
    ("a key that is a date", "2020-01-01: 1\n", (), ["2020-01-01: unknown key"]),
    ("a key that is a list", "[1]: 2\n", (), ["not readable as YAML", "unhashable"]),
    ("a key that is null in scorers", "scorers: {null: length}\n", (), None),
    ("a section that is a list", "policy: [max_steps, 3]\n", (), ["policy: "]),
    ("a section that is a text", "policy: max_steps=3\n", (), ["policy: "]),
    ("a number of 400 digits for an f", f"divergence: {{name: alpha, alpha: 1{'0' * 400}}}\n", (), ["a number too large"]),
    ("a number of 400 digits for steps", "", (f"policy.max_steps=1{'0' * 400}",), ["policy.max_steps", "a number too large"]),
    ("a number that Python cannot print", "", ("seed=0x" + "f" * 4000,), ["seed", "a number too large"]),
    ("more steps than a float can count", "", (f"policy.max_steps={2**60}",), ["policy.max_steps: "]),
    ("a step count that is not whole", "", ("policy.max_steps=3.5",), ["policy.max_steps: ", "3.5"]),
    ("a step count that is whole as a float", "", ("policy.max_steps=3.0",), None),
    ("a step count in words", "", ("policy.max_steps=three",), ["policy.max_steps: ", "'three'"]),
    ("a step count in quotes", "", ("policy.max_steps='3'",), None),
    ("no steps at all", "", ("sft.max_steps=0",), ["sft.max_steps: must be at least 1, or -1"]),
    ("negative steps", "", ("sft.max_steps=-7",), ["sft.max_steps: must be at least 1, or -1"]),
    ("no epochs", "", ("sft.num_train_epochs=0",), ["sft.num_train_epochs: ", "greater than 0"]),
    ("negative epochs", "", ("reward.num_train_epochs=-3",), ["reward.num_train_epochs: ", "greater than 0"]),
    ("checkpoints every -5 steps", "", ("sft.save_steps=-5",), ["sft.save_steps: "]),
    ("a warmup below zero", "", ("sft.warmup_steps=-5",), ["sft.warmup_steps: "]),
    ("a rate that is not a number", "", ("policy.learning_rate=.nan",), ["policy.learning_rate: ", "finite"]),
    ("a rate that is infinite", "", ("policy.learning_rate=1e999",), ["policy.learning_rate: ", "finite"]),
    ("a rate below zero", "", ("sft.learning_rate=-1e-4",), ["sft.learning_rate: ", "greater than 0"]),
    ("a boolean for a rate", "", ("sft.learning_rate=yes",), ["sft.learning_rate: ", "must be a number, not True"]),
    ("a boolean for a depth", "", ("reward.layers=[true]",), ["reward.layers.0: ", "must be a number, not True"]),
    ("a boolean for a moment", "", ("target={name: moments, moments: {praise: true}}",), ["target.moments.praise: must be a number"]),
    ("a date for a number", "", ("policy.learning_rate=2020-01-01",), ["policy.learning_rate: "]),
    ("bytes for a list", "", ("stages=!!binary aGk=",), ["stages: "]),
    ("a set for a list", "", ("stages=!!set {sft, policy}",), None),
    ("a mapping for a number", "", ("policy.num_prompts={a: 1}",), ["policy.num_prompts: "]),
    ("a list for a number", "", ("policy.num_prompts=[4]",), ["policy.num_prompts: "]),
    ("null for a number", "", ("policy.num_prompts=null",), ["policy.num_prompts: "]),
    ("an attention that is code of a stranger", "", ("model.attn_implementation=someone/kernel",), ["model.attn_implementation: ", "'sdpa'"]),
    ("an attention that is mistyped", "", ("model.attn_implementation=eagr",), ["model.attn_implementation: ", "'eager'"]),
    ("a scorer of the target that is mistyped", "", ("target.reward=prase",), ["no scorer named 'prase'; did you mean 'praise'?"]),
    ("a scorer inside a product that is mistyped", "", ("target={name: product, of: [{name: tilted, reward: prase}]}",), ["'prase'; did you mean 'praise'?"]),
    ("a scorer of a moment that is mistyped", "", ("target={name: moments, moments: {prase: 1}}",), ["'prase'; did you mean 'praise'?"]),
    ("a stage that is mistyped", "", ("stages=[sft, polcy]",), ["stages.1: ", "'policy'"]),
    ("a stage given twice", "", ("stages=[sft, sft]",), None),
    ("an override with two dots", "", ("policy..max_steps=3",), ["override 'policy..max_steps=3': write key=value"]),
    ("an override with a space for a sign", "", ("policy.max_steps 3",), ["override 'policy.max_steps 3': write key=value"]),
    ("an override with a colon for a sign", "", ("policy.max_steps:3",), ["write key=value"]),
    ("an override of a list's element", "", ("stages.0=sft",), ["stages: "]),
    ("an override into a number", "", ("seed.x=3",), ["seed: "]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "overrides", "said"), rows_of(CONFIGS))
def test_a_config_is_told_or_printed(base, tmp_path, call, text, overrides, said):
    (tmp_path / "bad.yaml").write_text(f"base: {base}\n{text}", encoding="utf-8")
    code, out, err = call("run", str(tmp_path / "bad.yaml"), *overrides, "--print-config")
    if said is None:
        assert (code, err) == (0, "")
        configs.parse(yaml.safe_load(out))
        return
    assert (code, out) == (2, "")
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert all(part in err for part in said), err


def test_a_device_without_end_is_no_config():
    assert "is it a config at all" in problems(configs.load, "/dev/zero")[0]


def keys(section=configs.RunConfig, at=""):
    for field in dataclasses.fields(section):
        inner = configs.checks._SECTIONS.get(field.name) if not at else None
        yield from keys(inner, f"{field.name}.") if inner else [at + field.name]


VALUES = st.sampled_from([
    "", "null", "true", "-1", "0", "1", "3.5", "1e308", ".nan", "-.inf", "0x10", "1:30", "1_000", str(2**53), "9" * 400,
    "'3'", "[]", "{}", "[1, a]", "{name: 3}", "{a: {b: [1]}}", "2020-01-01", "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]",
    '"\\ud800"', '"\\0"', "😀", '"\\u202eabc"', "a\tb", "[[[[1]]]]", "{1: 2, null: 3}", "js", "tilted",
])  # fmt: skip


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*keys()]), VALUES | st.text(max_size=10))
@example("seed", "0x" + "f" * 4000)
def test_any_value_under_any_key_is_a_config_or_a_users_error(base, key, value):
    try:
        config = configs.load(base, [f"{key}={value}"])
    except UserError as error:
        assert all(p.startswith(("override", base)) for p in error.problems)  # noqa: PT017
    else:
        assert configs.parse(yaml.safe_load(configs.dump(config))) == config


# -- data, by what every run does first --------------------------------------------------------------------------------

PROMPT = {"prompt": "film : one review :"}
PAIR = {**PROMPT, "chosen": " good", "rejected": " bad"}
LINE = json.dumps(PROMPT)
BAD_UTF8 = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pa.py_buffer(b"\xff")]
)


def parquet(**columns):
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


DATA = [  # the key of data, the file's name, what stands in it, what is said
    ("UTF-16", "prompts_train", "a.jsonl", LINE.encode("utf-16"), ["row 1: not UTF-8", "save the file as UTF-8"]),
    ("Latin-1", "prompts_train", "a.jsonl", '{"prompt": "café"}'.encode("latin-1"), ["row 1: not UTF-8", "byte 15"]),
    ("packed", "prompts_train", "a.jsonl", gzip.compress(LINE.encode()), ["row 1: not UTF-8"]),
    ("packed, by its name", "prompts_train", "a.jsonl.gz", gzip.compress(LINE.encode()), ["unknown kind of file '.gz'", ".jsonl"]),
    ("packed and cut", "prompts_train", "a.json", gzip.compress(LINE.encode() * 99)[:30], ["not readable as UTF-8 JSON"]),
    ("capital letters in the suffix", "prompts_train", "a.JSONL", LINE, ["'.JSONL'; use .jsonl"]),
    ("CSV", "prompts_train", "a.csv", "prompt\nfilm\n", ["'.csv'; use .jsonl"]),
    ("CSV that is named JSONL", "prompts_train", "a.jsonl", "prompt\nfilm\n", ["row 1: not JSON", "each line is a whole row"]),
    ("a list on one line", "prompts_train", "a.jsonl", json.dumps([PROMPT]), ["a JSON list, not an object; a list of rows goes into a .json file"]),
    ("a list over many lines", "prompts_train", "a.jsonl", json.dumps([PROMPT], indent=1), ["row 1: not JSON", "each line is a whole row"]),
    ("one object over many lines", "prompts_train", "a.jsonl", json.dumps(PROMPT, indent=1), ["each line is a whole row"]),
    ("an object for a list", "prompts_train", "a.json", LINE, ["must hold a list of objects, not dict"]),
    ("a comment", "prompts_train", "a.jsonl", f"// prompts\n{LINE}", ["row 1: not JSON"]),
    ("a file that was cut", "prompts_train", "a.jsonl", f"{LINE}\n{LINE[:12]}", ["row 2: not JSON"]),
    ("null bytes", "prompts_train", "a.jsonl", b"\0" * 1000, ["row 1: not JSON"]),
    ("nothing but a mark", "prompts_train", "a.jsonl", b"\xef\xbb\xbf", ["no rows; a split must have at least one"]),
    ("a mark and Windows' line ends", "prompts_train", "a.jsonl", f"\ufeff{LINE}\r\n\r\n{LINE}\r\n", None),
    ("an old Mac's line ends", "prompts_train", "a.jsonl", f"{LINE}\r{LINE}", ["row 1: not JSON", "Extra data"]),
    ("10 MB without an end", "prompts_train", "a.jsonl", '{"prompt": "' + "a" * 10_000_000, ["row 1: not JSON"]),
    ("a word of 10 MB", "sft_train", "a.jsonl", json.dumps({**PROMPT, "completion": "f" * 10_000_000}), None),
    ("a prompt beyond the context", "prompts_train", "a.jsonl", json.dumps({"prompt": "film " * 99}), ["row 1: the prompt has 99 tokens", "room for 58", "lower max_completion_length"]),
    ("a prompt of spaces", "prompts_train", "a.jsonl", '{"prompt": "\\u00a0 \\t"}', ["field 'prompt' is empty"]),
    ("a prompt without tokens", "prompts_train", "a.jsonl", '{"prompt": "\\u200b"}', None),
    ("half a surrogate pair", "prompts_train", "a.jsonl", '{"prompt": "\\ud83d"}', ["lone surrogate (\\ud83d)"]),
    ("a whole surrogate pair", "prompts_train", "a.jsonl", '{"prompt": "\\ud83d\\ude00"}', None),
    ("Chinese, right to left, emoji, control", "prompts_train", "a.jsonl", json.dumps({"prompt": "电影 \u202eסרט 👩‍👧 \x00\x1b"}), None),
    ("a prompt of messages", "prompts_train", "a.jsonl", '{"prompt": [{"role": "user"}]}', ["'prompt', message 1: must be like", '"content"']),
    ("a number for a prompt", "prompts_train", "a.jsonl", '{"prompt": 3}', ["'prompt' must be text, not int"]),
    ("NaN for a prompt", "prompts_train", "a.jsonl", '{"prompt": NaN}', ["'prompt' must be text, not float"]),
    ("a capital in a field's name", "prompts_train", "a.jsonl", '{"Prompt": "film"}', ["no field 'prompt'; did you mean 'Prompt'?"]),
    ("a space in a field's name", "prompts_train", "a.jsonl", '{" prompt": "film"}', ["did you mean ' prompt'?"]),
    ("the same id twice", "prompts_train", "a.jsonl", "\n".join([json.dumps({**PROMPT, "id": 1})] * 2), None),
    ("a column of many types", "prompts_train", "a.jsonl", "\n".join(json.dumps({**PROMPT, "x": x}) for x in (1, "a", None, [], {})), None),
    ("columns named as a scorer's own", "prompts_train", "a.jsonl", json.dumps({**PROMPT, "prompts": 1, "completions": 2, "self": 3}), None),
    ("fields in some rows alone", "sft_train", "a.jsonl", f'{{"prompt": "a", "completion": "b"}}\n{LINE}', ["row 2: no field 'completion'"]),
    ("bytes in Parquet", "prompts_train", "a.parquet", parquet(prompt=pa.array([b"film"])), ["'prompt' must be text, not bytes"]),
    ("numbers in Parquet", "prompts_train", "a.parquet", parquet(prompt=[1, 2]), ["row 2: field 'prompt' must be text, not int"]),
    ("a null in Parquet", "prompts_train", "a.parquet", parquet(prompt=["film", None]), ["row 2: field 'prompt' is null"]),
    ("categories in Parquet", "prompts_train", "a.parquet", parquet(prompt=pa.array(["film"] * 3).dictionary_encode()), None),
    ("no UTF-8 in Parquet", "prompts_train", "a.parquet", parquet(prompt=BAD_UTF8), ["not readable as Parquet", "utf-8"]),
    ("Parquet that was cut", "prompts_train", "a.parquet", parquet(prompt=["film"])[:-20], ["not readable as Parquet"]),
    ("Parquet that was damaged", "prompts_train", "a.parquet", b"PAR1" + b"z" * 20 + parquet(prompt=["film"])[24:], ["not readable as Parquet"]),
    ("no column in Parquet", "prompts_train", "a.parquet", parquet(text=["film"]), ["no field 'prompt'; known: text"]),
    ("the same text twice in every pair", "preferences_train", "a.jsonl", json.dumps({**PAIR, "rejected": " good"}), ["every pair has the same text twice"]),
    ("the same text twice in some pairs", "preferences_train", "a.jsonl", f'{json.dumps(PAIR)}\n{json.dumps({**PAIR, "rejected": " good"})}', None),
    ("raters who are undecided", "preferences_train", "a.jsonl", json.dumps({**PAIR, "preference": 0.5}), None),
    ("a share as text", "preferences_train", "a.jsonl", json.dumps({**PAIR, "preference": "0.5"}), ["'preference' must lie in [0, 1]", "'0.5'"]),
    ("a share that is NaN", "preferences_train", "a.jsonl", json.dumps({**PAIR, "preference": float("nan")}), ["'preference' must lie in [0, 1]", "nan"]),
    ("a share in percent", "preferences_train", "a.jsonl", json.dumps({**PAIR, "preference": 80}), ["'preference' must lie in [0, 1]", "80"]),
    ("a share that is true", "preferences_train", "a.jsonl", json.dumps({**PAIR, "preference": True}), ["'preference' must lie in [0, 1]"]),
    ("an empty answer", "preferences_train", "a.jsonl", json.dumps({**PAIR, "chosen": ""}), ["field 'chosen' is empty"]),
    ("a rating that is NaN", "gold", "a.jsonl", '{"text": "a", "rating": NaN}', ["'rating' must be a number, not nan"]),
    ("a rating beyond a float", "gold", "a.jsonl", '{"text": "a", "rating": 1e999}', ["'rating' must be a number, not inf"]),
    ("a rating in quotes", "gold", "a.jsonl", '{"text": "a", "rating": "5"}', ["'rating' must be a number, not '5'"]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "name", "content", "said"), rows_of(DATA))
def test_data_is_told_before_any_model_is_loaded(base, tmp_path, key, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    where = "scorers.gold.data" if key == "gold" else f"data.{key}"
    objective = ["objective=prefer"] if key.startswith("preferences") else []
    config = configs.load(base, [f"{where}={tmp_path / name}", *objective])
    if said is None:
        check_inputs(config, config.stages)
        return
    told = problems(check_inputs, config, config.stages)
    assert all(p.startswith(str(tmp_path / name)) for p in told)
    assert all(part in "\n".join(told) for part in said), told


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_saved_folder_that_lost_a_part_is_told(base, tmp_path, file):
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([PROMPT]).save_to_disk(tmp_path / "rows")
    config = configs.load(base, [f"data.prompts_train={tmp_path / 'rows'}", "stages=[policy]"])
    check_inputs(config, ["policy"])
    (tmp_path / "rows" / file).write_bytes((tmp_path / "rows" / file).read_bytes()[:50])
    assert "not readable as a folder that" in problems(check_inputs, config, ["policy"])[0]


@pytest.mark.parametrize(
    "source", ["/dev/zero", "/dev/null", ".", "/", "~", "s3://bucket/rows.jsonl", "data/*.jsonl", "toy/../../etc/passwd", "C:\\rows.jsonl", "-"]
)  # fmt: skip
def test_a_path_to_something_else_is_told(base, source):
    config = configs.load(base, [f"data.prompts_train={json.dumps(source)}"])
    (message,) = problems(check_inputs, config, ["policy"])
    assert message.startswith(f"{source}: ")


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates and controls among them
ANY = ANY_TEXT | st.none() | st.booleans() | st.integers() | st.floats() | st.lists(ANY_TEXT, max_size=2)
FIELDS = ("prompt", "completion", "chosen", "rejected", "text", "rating", "preference", "margin", "references", "x")
ROW = st.fixed_dictionaries(dict.fromkeys(FIELDS[:4], ANY_TEXT)) | st.dictionaries(
    st.sampled_from(FIELDS) | ANY_TEXT, ANY
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=3), st.sampled_from(["jsonl", "raw.jsonl", "json", "parquet"]))
@example([dict.fromkeys(FIELDS[:4], "\x00\u202e电影👩‍👧\ufeff")], "parquet")
@example([{**dict.fromkeys(FIELDS[:4], "film"), "x": 1}, {**dict.fromkeys(FIELDS[:4], "film"), "x": [{}]}], "parquet")
def test_any_rows_are_read_or_are_a_users_error(base, tmp_path_factory, rows, kind):
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    if kind == "parquet":
        write_table(
            path,
            {
                k: [row.get(k) for row in rows]
                for k in dict.fromkeys(key for row in rows for key in row)
                if k.isprintable()
            },
        )
    else:
        lines = [json.dumps(row, ensure_ascii=kind != "raw.jsonl") for row in rows]
        path.write_text(f"[{','.join(lines)}]" if kind == "json" else "\n".join(lines), "utf-8", "surrogatepass")
    config = configs.load(base, ["objective=prefer", "stages=[sft, reward, prefer, evaluate]"])
    config = dataclasses.replace(config, data=type(config.data)(*[str(path)] * len(dataclasses.fields(config.data))))
    try:
        check_inputs(config, [*config.stages, "policy"])
    except UserError as error:
        assert all(str(path) in p for p in error.problems)  # noqa: PT017


# -- model folders -----------------------------------------------------------------------------------------------------


def edit(name, **keys):
    def harm(folder):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **keys}))

    return harm


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:500])


def weights(change):
    def harm(folder):
        made = load_file(folder / "model.safetensors")
        save_file(change(made) or made, folder / "model.safetensors", metadata={"format": "pt"})

    return harm


def adapter(**keys):
    return write("adapter_config.json", json.dumps(keys).encode())


def other_words(folder):
    words = Tokenizer(models.WordLevel({word: i + 30 for i, word in enumerate(tiny.WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")
    made.save_pretrained(folder)


def one_word_more(folder):
    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens(["<image>"])
    words.save_pretrained(folder)


WEIGHTS, NOT_THERE = "model.safetensors", "of the weights that its config asks for are not there, or of another shape: "
MODELS = [  # the harm, what is said
    ("nothing there", shutil.rmtree, ["no tokenizer there", "no model there"]),
    ("no config", lambda folder: (folder / "config.json").unlink(), ["no model there"]),
    ("a config that was cut", cut("config.json"), ["no model there"]),
    ("a config that is a list", write("config.json", b"[]"), ["no model there"]),
    ("a config that is null", write("config.json", b"null"), ["no model there"]),
    ("a config of bytes", write("config.json", bytes(range(256))), ["no model there"]),
    ("a kind that nobody knows", edit("config.json", model_type="blurb"), ["no model there", "blurb"]),
    ("a context in words", edit("config.json", max_position_embeddings="many"), ["no model there", "max_position_embeddings"]),
    ("heads that do not divide", edit("config.json", num_attention_heads=5), ["no model there", "number of attention heads"]),
    ("a function that nobody knows", edit("config.json", hidden_act="bad"), ["can be loaded", "KeyError: 'bad'"]),
    ("another size", edit("config.json", hidden_size=64), ["21 " + NOT_THERE]),
    ("a layer too many", edit("config.json", num_hidden_layers=3), ["9 " + NOT_THERE + "model.layers.2."]),
    ("another kind", edit("config.json", model_type="bert"), ["bert is a masked LM"]),
    ("no words", lambda folder: (folder / "tokenizer.json").unlink(), ["no tokenizer there"]),
    ("words that were cut", cut("tokenizer.json"), ["no tokenizer there"]),
    ("words that are a list", write("tokenizer.json", b"[]"), ["no tokenizer there"]),
    ("words that are an empty object", write("tokenizer.json", b"{}"), ["no tokenizer there"]),
    ("a list for the words' config", write("tokenizer_config.json", b"[]"), ["no tokenizer there"]),
    ("an EOS that is a number", edit("tokenizer_config.json", eos_token=3), ["no tokenizer there"]),
    ("an EOS that is no word", edit("tokenizer_config.json", eos_token="<end>"), ["gives '<end>' the id 24", "embeddings have 24 rows"]),
    ("a pad that is no word", edit("tokenizer_config.json", pad_token="<none>"), ["gives '<none>' the id 24", "resize_token_embeddings"]),
    ("words of another model", other_words, ["gives 'five' the id 53", "embeddings have 24 rows", "belongs to it"]),
    ("a word more that no text needs", one_word_more, None),
    ("no weights", lambda folder: (folder / WEIGHTS).unlink(), ["no weights in safetensors there"]),
    ("weights that were cut", cut(WEIGHTS), ["no weights in safetensors there"]),
    ("weights of no bytes", write(WEIGHTS, b""), ["no weights in safetensors there", "header too small"]),
    ("weights of any bytes", write(WEIGHTS, b"garbage" * 99), ["no weights in safetensors there", "header too large"]),
    ("an index of shards that is a list", lambda folder: (folder / WEIGHTS).rename(folder / "x") and (folder / f"{WEIGHTS}.index.json").write_text("[]"), ["no weights in safetensors there"]),
    ("a weight that is missing", weights(lambda w: w.pop("model.layers.0.mlp.up_proj.weight") is None), ["1 " + NOT_THERE + "model.layers.0.mlp.up_proj.weight"]),
    ("a head that is missing", weights(lambda w: w.pop("lm_head.weight") is None), ["1 " + NOT_THERE + "lm_head.weight"]),
    ("a head that is the embeddings", edit("config.json", tie_word_embeddings=True), None),
    ("weights of other names", weights(lambda w: {f"x.{k}": v for k, v in w.items()}), ["21 " + NOT_THERE]),
    ("a weight of another shape", weights(lambda w: w | {"model.embed_tokens.weight": torch.zeros(10, 32)}), ["1 " + NOT_THERE]),
    ("a weight that is nan", weights(lambda w: w | {"model.norm.weight": torch.full((32,), torch.nan)}), ["its weight model.norm.weight is not finite"]),
    ("an adapter's config that was cut", write("adapter_config.json", b"{"), ["no model there"]),
    ("an adapter without a base", adapter(), ["no model there", "base_model_name_or_path"]),
    ("an adapter whose base is null", adapter(base_model_name_or_path=None), ["no model there"]),
    ("an adapter whose base is gone", adapter(base_model_name_or_path="/gone"), ["no model there", "/gone"]),
    ("an adapter on itself", lambda folder: adapter(base_model_name_or_path=str(folder))(folder), ["no model there"]),
    ("an adapter without weights", lambda folder: adapter(base_model_name_or_path=str(shutil.copytree(folder, f"{folder}-base")), peft_type="LORA", r=2, target_modules=["q_proj"])(folder), ["no adapter_model.safetensors"]),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "said"), rows_of(MODELS))
def test_a_model_folder_is_told(base, start, tmp_path, harm, said):
    folder = tmp_path / "model"
    shutil.copytree(start, folder)
    harm(folder)
    config = configs.load(base, [f"model.name_or_path={folder}"])

    def load():
        check_inputs(config, ["policy"])
        load_policy(str(folder), config.model)

    if said is None:
        load()
        return
    told = "\n".join(problems(load))
    assert told.startswith(f"model {folder}: ")
    assert all(part in told for part in said), told


# -- scorers -----------------------------------------------------------------------------------------------------------

MODULES = {"raises": "1 / 0", "syntax": "def f(:", "exits": "import sys; sys.exit(3)", "number": "f = 3"}


@pytest.mark.parametrize("name", MODULES)
def test_a_function_whose_module_fails_is_told_before_any_model_is_loaded(base, tmp_path, monkeypatch, name):
    (tmp_path / f"{name}_at_import.py").write_text(MODULES[name])
    monkeypatch.syspath_prepend(tmp_path)
    config = configs.load(base, [f"scorers.praise={{name: function, path: '{name}_at_import:f'}}"])
    (message,) = problems(check_inputs, config, ["policy"])
    assert f"{name}_at_import:f" in message


def leaves(prompts, completions, **columns):
    sys.exit(3)


def trims(prompts, completions, **columns):
    completions[:] = [c.strip() for c in completions if c.strip()]
    return [float(len(c)) for c in completions]


def learns(prompts, completions, **columns):
    return torch.ones(len(completions), requires_grad=True)


def test_a_function_that_exits_in_a_thread_ends_the_run_and_does_not_hang_it():
    scorers = Scorers({"mine": Function(f"{__name__}:leaves", num_workers=2)}, torch.device("cpu"))
    assert "it called exit(3)" in problems(scorers, ["mine"], ["p"], ["c"])[0]


def test_a_function_that_changes_its_lists_changes_no_other_and_its_gradient_goes_nowhere():
    scorers = Scorers({"a": Function(f"{__name__}:trims"), "b": Function(f"{__name__}:learns")}, torch.device("cpu"))
    completions = [" one ", "two"]
    scores = scorers(["a", "b"], ["p", "q"], completions)
    assert completions == [" one ", "two"]
    assert not scores["b"].requires_grad


# -- whole stages ------------------------------------------------------------------------------------------------------

STEP = ("policy.max_steps=1", "sft.max_steps=1")
STAGES = [  # the stage, overrides, what is said
    ("LoRA on modules that are not there", "policy", ["model.lora={target_modules: nope}"], ["model.lora does not fit it", "nope"]),
    ("LoRA by a broken pattern", "policy", ["model.lora={target_modules: '('}"], ["model.lora does not fit it"]),
    ("an attention that is not installed", "policy", ["model.attn_implementation=flash_attention_2"], ["FlashAttention2"]),
    ("moments out of reach", "policy", ["target={name: moments, moments: {praise: 99}}"], ["praise = 99 is outside the reachable range"]),
    ("a reward model that is none", "policy", ["scorers.praise={name: reward_model, path: START}"], ["one label", "LlamaForCausalLM"]),
    ("a path of 5,000 letters", "policy", ["output_dir=" + "a" * 5000], ["cannot be used", "File name too long"]),
    ("a null byte in a path", "policy", ['output_dir="a\\0b"'], ["cannot be used", "null byte"]),
    ("prompts that fill max_length", "sft", ["sft.max_length=2"], ["sft_train.jsonl: no row fits into sft.max_length = 2 tokens"]),
    ("a date for TRL", "sft", ["sft.training_args={logging_steps: 2020-01-01}"], ["sft.training_args.logging_steps: ", "valid number"]),
    ("a text for TRL's number", "sft", ["sft.training_args={max_grad_norm: abc, data_seed: x}"], ["sft.training_args.max_grad_norm: ", "sft.training_args.data_seed: "]),
    ("a key that the run has itself", "sft", ["sft.training_args={seed: 3, max_steps: 4}"], ["training_args.seed: the run has a key of its own", "training_args.max_steps: "]),
    ("a value that TRL refuses", "sft", ["sft.training_args={loss_type: nope}"], ["sft: TRL's trainer: ", "nope", "training_args loss_type"]),
    ("a word that is not there for TRL", "sft", ["sft.training_args={eos_token: <end>}"], ["'<end>'", "training_args eos_token"]),
    ("a package that is not there for TRL", "sft", ["sft.training_args={use_liger_kernel: true}"], ["liger", "training_args use_liger_kernel"]),
    ("a rate at which SFT breaks the model", "sft", ["sft.learning_rate=1e30", "sft.max_steps=3"], ["is not finite; was its learning rate too high?"]),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "overrides", "said"), rows_of(STAGES))
def test_a_stage_is_told(base, start, tmp_path, stage, overrides, said):
    words = [word.replace("START", start) for word in overrides]
    told = "\n".join(problems(run, base, f"stages=[{stage}]", f"output_dir={tmp_path}", *STEP, *words))
    assert all(part in told for part in said), told


def odd(prompts, completions, **columns):
    return [torch.nan if "fail" in columns["x"] else 1.0] * len(completions)


def test_columns_of_many_types_go_through_the_policy_stage_into_its_tables(base, tmp_path):
    values = [1, "a", None, [{"b": 1}], {}, 10**30, "\ud800", True, 1.5]
    prompts = tiny.write_rows(tmp_path / "odd.jsonl", [{**PROMPT, "x": x, "y": "电影"} for x in values])
    words = (f"scorers.praise={{name: function, path: '{__name__}:odd'}}", f"data.prompts_train={prompts}", *STEP)
    out = run(base, "stages=[policy]", f"output_dir={tmp_path}", "policy.num_prompts=9", *words).stage("policy")
    written = tiny.completions(out)
    assert sorted(set(written["x"])) == sorted(json.dumps(x) for x in values)
    assert set(written["y"]) == {"电影"}
    tiny.write_rows(tmp_path / "odd.jsonl", [{**PROMPT, "x": x} for x in ["fail", {"b": 1}, 3]])
    told = problems(
        run, base, "stages=[policy]", f"output_dir={tmp_path}", "name=failed", "policy.num_prompts=3", *words
    )
    assert "gave nan" in told[0]
    (kept,) = tmp_path.rglob("bad_batch-1.parquet")
    assert set(pd.read_parquet(kept)["x"]) >= {'"fail"', '{"b": 1}'}


@pytest.mark.parametrize(
    "stage", [pytest.param("sft", marks=pytest.mark.slow), "reward", pytest.param("prefer", marks=pytest.mark.slow)]
)
def test_texts_of_any_script_go_through_a_whole_stage(base, tmp_path, stage):
    texts = ["电影\x00", "\u202eסרט", "👩‍👧\x1b[31m", "\ufeff good", "e\u0301\u200d", "\\ud800 {x!r} %s"]
    rows = [{"prompt": t, "completion": t, "chosen": t, "rejected": t[::-1] + "good"} for t in texts]
    path = tiny.write_rows(tmp_path / "any.jsonl", rows)
    files = [f"data.{field.name}={path}" for field in dataclasses.fields(configs.options.DataOptions)]
    objective = ["objective=prefer"] if stage == "prefer" else []
    out = run(base, f"stages=[{stage}]", f"output_dir={tmp_path}", *files, *objective, *STEP).stage(stage)
    assert (out / "finished.json").is_file()
