"""The config: files that build on each other, overrides, one message for every mistake, and the way back to YAML."""

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rlhf_fdiv import config as configs
from rlhf_fdiv import divergences
from rlhf_fdiv.config import STAGES, RunConfig, differences, dump, load, parse, schema, to_dict
from rlhf_fdiv.config.files import read_yaml, with_overrides
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.estimators import ESTIMATORS
from rlhf_fdiv.model_options import LoraOptions, ModelOptions
from rlhf_fdiv.objectives import OBJECTIVES, Match, Regularise
from rlhf_fdiv.rewards import SCORERS, Length, check_scorers
from rlhf_fdiv.targets import TARGETS, Tilted

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
DATA = dict.fromkeys(("sft_train", "preferences_train", "prompts_train", "prompts_eval"), "rows.jsonl")
RAW = {"name": "x", "model": {"name_or_path": "m"}, "data": DATA}
WHOLE = yaml.safe_dump(RAW)
CHOICES = {
    "objective": [
        {"name": "match"},
        {"name": "regularise", "beta": 0.5},
        {"name": "prefer", "beta": 0.5, "label_smoothing": 0.1},
        {"name": "distil", "on_policy": 0.5, "skew": 0.1, "skew_of": "teacher"},
    ],
    "target": [
        {"name": "tilted", "beta": 0.3, "reward": "reward"},
        {"name": "moments", "moments": {"reward": 0.5}},
        {"name": "moments", "moments": {"reward": 0.5}, "lambdas": {"reward": -1.5}},
        {"name": "pointwise", "scorer": "reward", "floor": 0.1},
        {"name": "product", "of": ["tilted", {"name": "pointwise", "scorer": "reward", "floor": 0.01}]},
        {"name": "product", "of": [{"name": "product", "of": ["tilted"]}]},
    ],
    "estimator": ["reinforce", "rloo", {"name": "grpo", "clip_range": None}, {"name": "ppo", "lam": 1.0}],
    "divergence": [*divergences.names(), {"name": "alpha", "alpha": 0.3}, {"name": "js", "unit_curvature": True}],
    "scorers": [
        {"reward": scorer}
        for scorer in (
            {"name": "reward_model", "path": "p", "clip": [-4, 4]},
            {"name": "ngram_ridge", "data": "d.jsonl"},
            {"name": "pattern", "pattern": r"\bact(ing|ors?)\b: 模型 \u2028"},
            {"name": "length", "scale": 10},
            {"name": "function", "path": "a.b:c"},
        )
    ]
    + [{"reward": {"name": "threshold", "of": "other", "above": 1.5}, "other": "length"}]
    + [{"reward": {"name": "sum", "of": {"other": 0.5}}, "other": "length"}],
}


def raw(*overrides: str, **keys):
    """RAW with whole keys replaced, then overrides."""
    return with_overrides({**copy.deepcopy(RAW), **keys}, list(overrides))


def problems(function, *args) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert all(isinstance(p, str) and p for p in caught.value.problems)
    return caught.value.problems


def at(path: str, value):
    """RAW with `value` at a dotted path, a number in it being the place in a list of one."""
    value = copy.deepcopy(value)
    for key in reversed(path.split(".")):
        value = [value] if key.isdigit() else {key: value}
    out = copy.deepcopy(RAW)
    top, inner = next(iter(value.items()))
    out[top] = {**out[top], **inner} if isinstance(out.get(top), dict) and isinstance(inner, dict) else inner
    return out


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# composition


def test_the_nearer_file_wins_and_sections_merge_key_by_key(write):
    write("far/far.yaml", "seed: 1\nsft: {max_steps: 1, max_length: 1, training_args: {a: 1}}")
    write("middle.yaml", "base: far/far.yaml\nseed: 2\nsft: {max_steps: 2, max_length: 2}")
    near = write("sub/near.yaml", "base: ../middle.yaml\nsft: {max_steps: 3, training_args: {b: 2}}")
    assert read_yaml(near) == {
        "seed": 2,
        "sft": {"max_steps": 3, "max_length": 2, "training_args": {"a": 1, "b": 2}},
    }


def test_of_several_bases_the_later_wins_and_a_shared_one_is_no_cycle(write):
    write("root.yaml", "seed: 0\noutput_dir: root")
    write("a.yaml", "base: root.yaml\nseed: 1\nreuse: a")
    write("b.yaml", "base: root.yaml\nseed: 2")
    near = write("near.yaml", "base: [a.yaml, b.yaml]\nname: near")
    assert read_yaml(near) == {"seed": 2, "output_dir": "root", "reuse": "a", "name": "near"}


@pytest.mark.parametrize("files", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}])
def test_a_cycle_of_bases_is_named(write, files):
    for name, base in files.items():
        write(f"{name}.yaml", f"base: {base}.yaml")
    (message,) = problems(read_yaml, write("a.yaml", f"base: {files['a']}.yaml"))
    assert "base" in message
    assert ".yaml" in message


@pytest.mark.parametrize("base", ["3", "true", "{a: 1}", "[[a.yaml]]", "1.5", '"a\\0b"'])
def test_a_base_that_is_no_file_name_is_an_error(write, base):
    (message,) = problems(read_yaml, write("near.yaml", f"base: {base}"))
    assert "near.yaml" in message
    assert "base" in message


def test_a_missing_base_is_named(write):
    assert "gone.yaml: no such config file" in problems(read_yaml, write("near.yaml", "base: gone.yaml"))[0]


@pytest.mark.parametrize(
    ("far", "near", "merged"),
    [
        ("target: {name: tilted, beta: 1}", "target: {name: tilted, reward: r}", {"beta": 1, "reward": "r"}),
        ("target: {name: tilted, beta: 1}", "target: {reward: r}", {"beta": 1, "reward": "r"}),
        ("target: {name: tilted, beta: 1}", "target: tilted", {"beta": 1}),
        ("target: tilted", "target: {beta: 2}", {"beta": 2}),
        ("target: {name: moments, moments: {a: 1}}", "target: {name: tilted, beta: 2}", {"beta": 2}),
        ("target: {name: moments, moments: {a: 1}}", "target: tilted", {}),
        ("target: {beta: 2}", "target: {name: tilted}", {"beta": 2}),
    ],
)
def test_a_choice_of_another_name_replaces_the_whole_choice(write, far, near, merged):
    write("far.yaml", far)
    assert read_yaml(write("near.yaml", f"base: far.yaml\n{near}"))["target"] == {"name": "tilted", **merged}


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("objective", "{name: regularise, beta: 2}", "match"),
        ("estimator", "{name: ppo, lam: 0.5}", "rloo"),
        ("divergence", "{name: alpha, alpha: 0.3}", "js"),
    ],
)
def test_every_choice_leaves_no_parameter_of_the_old_one(write, key, old, new):
    far = write("far.yaml", f"{key}: {old}")
    near = write("near.yaml", f"base: far.yaml\n{key}: {new}")
    assert read_yaml(near)[key] == with_overrides(read_yaml(far), [f"{key}={new}"])[key] == {"name": new}
    parse(raw(**{key: read_yaml(near)[key]}))


@pytest.mark.parametrize(
    ("text", "override", "read", "expected"),
    [
        ("sft: {divergence: {name: alpha, alpha: 0.3}}", "sft.divergence=js", lambda c: c.sft.divergence, "js"),
        ("sft: {divergence: alpha}", "sft.divergence.alpha=0.3", lambda c: c.sft.divergence["alpha"], 0.3),
        ("scorers: {reward: length}", "scorers.reward.scale=2", lambda c: c.scorers["reward"], Length(2.0)),
        ("scorers: {reward: {name: pattern, pattern: a}}", "scorers.reward=length", lambda c: c.scorers["reward"],
         Length()),
        ("policy: {model: a, max_steps: 3}", "policy.model=b/c", lambda c: (c.policy.model, c.policy.max_steps),
         ("b/c", 3)),
        ("seed: 0", "target.beta=0.7", lambda c: c.target, Tilted(0.7)),
        ("target: {beta: 0.7}", "seed=1", lambda c: c.target, Tilted(0.7)),
        ("objective: regularise", "objective.beta=0.7", lambda c: c.objective, Regularise(0.7)),
        ("objective: {name: regularise, beta: 2}", "objective=match", lambda c: c.objective, Match()),
        ("sft: {max_steps: 3}", "sft=null", lambda c: c.sft.max_steps, -1),
    ],
)  # fmt: skip
def test_an_override_reaches_a_choice_wherever_it_stands(write, text, override, read, expected):
    found = read(load(write("a.yaml", f"{WHOLE}{text}"), [override]))
    assert (found.get("name", found) if expected == "js" and isinstance(found, dict) else found) == expected


@pytest.mark.parametrize("override", [True, False])
def test_a_model_given_as_a_name_keeps_the_base_files_dtype_and_lora(write, override):
    write("far.yaml", f"{WHOLE}\n".replace("name_or_path: m", "name_or_path: m\n  dtype: bfloat16\n  lora: {r: 4}"))
    near = write("near.yaml", "base: far.yaml\n" + ("" if override else "model: other/model\n"))
    config = load(near, ["model=other/model"] if override else [])
    assert config.model == ModelOptions("other/model", "bfloat16", LoraOptions(r=4))


def test_the_beta_of_regularise_and_of_its_tilted_target_are_one():
    """r/β is the potential and r − β·f' the pseudo-reward: two of them would scale a reward that nobody asked for."""
    for betas in (
        {"target": {"beta": 0.3}},
        {"objective": {"beta": 0.3}},
        {"target": {"beta": 0.3}, "objective": {"beta": 0.3}},
    ):
        config = parse(raw(objective={"name": "regularise", **betas.get("objective", {})},
                           target={"name": "tilted", **betas.get("target", {})}))  # fmt: skip
        assert (config.objective, config.target.beta, config.beta) == (Regularise(0.3), 0.3, 0.3)
        assert parse(configs.to_dict(config)) == config
    both = raw(objective={"name": "regularise", "beta": 0.5}, target={"name": "tilted", "beta": 0.3})
    assert problems(parse, both) == ("objective.beta: 0.5, and target.beta is 0.3; they are one β, set one",)
    moments = {"name": "moments", "moments": {"reward": 1.0}}
    assert parse(raw(objective={"name": "regularise", "beta": 0.5}, target=moments)).objective == Regularise(0.5)


# reading YAML


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.e-6", "+1e-6", "0.1e-5", ".1e-5", "1.0e-6", "0.000001"])
def test_a_small_number_is_a_number_in_files_and_overrides(write, text):
    for value in (read_yaml(write("a.yaml", f"a: {text}"))["a"], with_overrides({}, [f"a={text}"])["a"]):
        assert isinstance(value, float)
        assert value == pytest.approx(1e-6)


@pytest.mark.parametrize("text", ["010", "-07", "1:30", "1_0:30:00"])
def test_numbers_that_are_not_what_they_look_like_are_refused(write, text):
    for (message,) in (problems(read_yaml, write("a.yaml", f"a: {text}")), problems(with_overrides, {}, [f"a={text}"])):
        assert f"{text} is no decimal number" in message
    assert with_overrides({}, [f"a='{text}'", "b=0", "c=10", "d=0x10"]) == {"a": text, "b": 0, "c": 10, "d": 16}


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a: {b: 1, b: 1}", "a: [{b: 1, b: 2}]", "a: 1\nb: 2\n'a': 3"])
def test_a_key_given_twice_is_refused_by_name(write, text):
    (message,) = problems(read_yaml, write("twice.yaml", text))
    assert "twice.yaml" in message
    assert "'b'" in message or "'a'" in message


def test_yaml_merge_keys_work_and_the_local_key_wins(write):
    path = write("a.yaml", "sft: &common {max_steps: 1, max_length: 9}\nreward:\n  <<: *common\n  max_steps: 2")
    assert read_yaml(path)["reward"] == {"max_steps": 2, "max_length": 9}


def test_byte_order_mark_and_windows_line_ends_change_nothing(write):
    text = f"# Überschrift\n{WHOLE}output_dir: ördner\n"
    plain = load(write("a.yaml", text), ["name=n"])
    assert load(write("b.yaml", b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()), ["name=n"]) == plain
    assert plain.output_dir == "ördner"


@pytest.mark.parametrize(
    "content",
    [
        "", "# nothing\n", "---\n", "- a\n- b\n", "text", "3", "a:\n\tb: 1\n", "a: [", "a: 1\n---\nb: 2\n", "a: *x",
        "a: !x 1", "a: !!python/object/apply:os.getcwd []", "a: !!int x", "a: 2020-13-45", "? [1]\n: 2", "a: &a [*a]",
        "[" * 5000, f"a: {'9' * 5000}", bytes(range(256)), b"a: \x00", b"a: \xe9",
        "a: 1".encode("utf-16"), b"\x1f\x8b\x08\x00\x00",
    ],
)  # fmt: skip
def test_a_file_that_is_no_mapping_is_one_message_that_names_it(write, content):
    (message,) = problems(load, write("bad.yaml", content))
    assert "bad.yaml" in message
    assert "\n" not in message


def test_a_folder_or_a_missing_file_is_one_message_that_names_it(tmp_path):
    for path in (tmp_path, tmp_path / "gone.yaml", tmp_path / ("n" * 300 + ".yaml")):
        assert path.name in problems(load, path)[0]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet="ab1:-{}[],&*!?|>'\"%@#\n\t \0<.e", max_size=40).map(str.encode))
def test_no_file_content_raises_anything_but_a_user_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(read_yaml(path), dict)
    except UserError as error:
        assert "random.yaml" in str(error) or "base" in str(error)  # noqa: PT017


# overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("1e-6", 1e-6), ("true", True), ("null", None), ("", None), ("~", None), ("[1, a]", [1, "a"]),
        ("{b: 1}", {"b": 1}), ("x=y", "x=y"), ("'3'", "3"), (" 4", 4), ("é 模型", "é 模型"), ("a//b/", "a//b/"),
    ],
)  # fmt: skip
def test_an_overrides_value_is_yaml(text, value):
    assert with_overrides({"seed": 0, "sft": {"a": 1}}, [f"sft.b.c={text}"]) == {
        "seed": 0,
        "sft": {"a": 1, "b": {"c": value}},
    }


def test_the_last_override_wins_and_the_input_stays():
    before = {"sft": {"max_steps": 0}}
    assert with_overrides(before, ["sft.max_steps=1", "sft.max_steps=2"]) == {"sft": {"max_steps": 2}}
    assert before == {"sft": {"max_steps": 0}}


@pytest.mark.parametrize(
    "override",
    [
        "a", "=1", "a.=1", ".a=1", "a..b=1", "--a=[", "a=[1", "a='x", "a=@x", "a=*x", "a=\0", "a={b: 1, b: 2}",
        "a=!!int x", "a=!!float x", "a=2020-13-45", "a=!!python/name:os.getcwd", "a=" + "[" * 5000, "a=" + "9" * 5000,
    ],
)  # fmt: skip
def test_a_bad_override_is_named(override):
    (message,) = problems(with_overrides, {}, [override])
    assert message.startswith("override ")
    assert "\n" not in message


def test_all_bad_overrides_are_named_at_once():
    assert len(problems(with_overrides, {}, ["a", "b=1", "c=[", "=3"])) == 3


@given(st.text(max_size=20), st.text(alphabet="ab1:-{}[],&*!'\"\n\t \0<.e=", max_size=20))
def test_no_override_raises_anything_but_a_user_error(key, value):
    for override in (f"{key}={value}", value):
        try:
            with_overrides({"sft": {"max_steps": 1}, "seed": 0}, [override])
        except UserError as error:
            assert "override" in str(error)  # noqa: PT017


def test_base_cannot_be_an_override_for_nothing_would_read_it(write):
    assert "base" in problems(load, write("a.yaml", WHOLE), ["base=other.yaml"])[0]


# mistakes: each is one message that names the full key

UNKNOWN = [  # the wrong key, its section where that needs more than the key, what was meant
    ("seeed", None, "seed"),
    ("polcy", None, "policy"),
    ("model.dtyp", None, "dtype"),
    ("model.lora.lora_alfa", None, "lora_alpha"),
    ("data.sft_trian", None, "sft_train"),
    ("sft.learning_rat", None, "learning_rate"),
    ("reward.layer", None, "layers"),
    ("policy.num_generation", None, "num_generations"),
    ("evaluate.num_prompt", None, "num_prompts"),
    ("objective.bta", {"name": "regularise"}, "beta"),
    ("target.betaa", {"name": "tilted"}, "beta"),
    ("target.num_prompt", {"name": "moments", "moments": {"reward": 1}}, "num_prompts"),
    ("target.flor", {"name": "pointwise", "scorer": "reward"}, "floor"),
    ("target.off", {"name": "product", "of": ["tilted"]}, "of"),
    ("target.of.0.betaa", {"name": "tilted"}, "beta"),
    ("estimator.clip_rnge", {"name": "ppo"}, "clip_range"),
    ("estimator.scale_reward", {"name": "grpo"}, "scale_rewards"),
    ("divergence.alfa", {"name": "alpha"}, "alpha"),
    ("divergence.unit_curvatur", {"name": "js"}, "unit_curvature"),
    ("sft.divergence.alfa", {"name": "alpha"}, "alpha"),
    ("reward.divergence.alfa", {"name": "alpha"}, "alpha"),
    ("evaluate.divergences.0.alfa", {"name": "alpha"}, "alpha"),
    ("scorers.x.clp", {"name": "reward_model"}, "clip"),
    ("scorers.x.dta", {"name": "ngram_ridge", "data": "d"}, "data"),
    ("scorers.x.patern", {"name": "pattern", "pattern": "a"}, "pattern"),
    ("scorers.x.scal", {"name": "length"}, "scale"),
    ("scorers.x.abov", {"name": "threshold", "of": "reward"}, "above"),
    ("scorers.x.pth", {"name": "function", "path": "a:b"}, "path"),
]


def nested(path: str, section, key: str, value) -> dict:
    """A config in which only `path` is wrong: `section` (a choice with its required keys) plus `key: value`."""
    *outer, _ = path.split(".")
    made = at(".".join(outer), {**(section or {}), key: value}) if outer else {**RAW, key: value}
    if outer[:1] == ["model"]:
        made["model"] = {"name_or_path": "m"} | made["model"]
    if outer[:1] == ["data"]:
        made["data"] = DATA | made["data"]
    if outer[:1] == ["scorers"]:
        made["scorers"]["reward"] = {"name": "reward_model"}
    if outer[:2] == ["target", "of"]:
        made["target"] = {"name": "product", **made["target"]}
    return made


@pytest.mark.parametrize(("path", "section", "meant"), UNKNOWN)
def test_an_unknown_key_is_named_in_full_with_what_was_meant(path, section, meant):
    (message,) = problems(parse, nested(path, section, path.split(".")[-1], 1))
    assert message.startswith(f"{path}: ")
    assert f"did you mean {meant!r}?" in message


@pytest.mark.parametrize("path", sorted({p.rpartition(".")[0] for p, _, _ in UNKNOWN}))
def test_a_key_like_no_other_brings_the_known_ones(path):
    _, section, meant = next(case for case in UNKNOWN if case[0].rpartition(".")[0] == path)
    full = f"{path}.qqqqqq".removeprefix(".")
    (message,) = problems(parse, nested(full, section, "qqqqqq", 1))
    assert message.startswith(f"{full}: ")
    known = re.findall(r"\w+", message.removeprefix(full))
    assert meant in known
    assert len(known) == len(set(known))


@pytest.mark.parametrize(("path", "section"), [("objective", "match"), ("estimator", "rloo"), ("divergence", "js")])
def test_a_key_of_a_choice_without_parameters_says_so(path, section):
    (message,) = problems(parse, nested(f"{path}.qqqqqq", {"name": section}, "qqqqqq", 1))
    assert not message.rstrip().endswith((":", "known"))


def test_two_unknown_parameters_of_a_divergence_are_two_messages():
    assert len(problems(parse, raw(divergence={"name": "alpha", "beta": 1, "gamma": 2}))) == 2


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("objective", "mach", "match"),
        ("objective", {"name": "regularize"}, "regularise"),
        ("target", "tlited", "tilted"),
        ("estimator", "rlo", "rloo"),
        ("divergence", "reverse_kll", "reverse_kl"),
        ("sft.divergence", "foward_kl", "forward_kl"),
        ("reward.divergence", "foward_kl", "forward_kl"),
        ("evaluate.divergences.0", "pearson", "pearson_chi2"),
        ("scorers.reward", "reward_modl", "reward_model"),
        ("stages.0", "polcy", "policy"),
        ("resume", "polcy", "policy"),
        ("report_to", "tensorbord", "tensorboard"),
        ("model.dtype", "float3", "float32"),
        ("sft.lr_scheduler_type", "linaer", "linear"),
        ("reward.method", "fine_tune", "finetune"),
        ("policy.engine", "cache", "cached"),
    ],
)
def test_an_unknown_name_brings_the_one_that_was_meant(key, value, meant):
    made = at(key, value)
    if key == "model.dtype":
        made["model"]["name_or_path"] = "m"
    (message,) = problems(parse, made)
    assert message.startswith(key)
    assert repr(meant) in message


WRONG_TYPE = [
    ("name", 3), ("name", None), ("seed", "a"), ("seed", None), ("seed", 1.5), ("seed", True), ("output_dir", None),
    ("stages", "policy"), ("stages", None), ("stages.0", 3), ("reuse", 3), ("resume", 3), ("report_to", True),
    ("model", 3), ("model", []), ("model.name_or_path", 3), ("model.dtype", 32), ("model.attn_implementation", 3),
    ("model.lora", True), ("model.lora.r", "many"), ("model.lora.target_modules", 3), ("data", []),
    ("data", "rows.jsonl"), ("data.sft_train", 3), ("data.prompts_eval", ["a"]), ("sft", 3),
    ("sft.learning_rate", "fast"), ("sft.max_steps", 1.5), ("sft.max_steps", True), ("sft.training_args", 3),
    ("sft.divergence", 3), ("sft.divergence", None), ("sft.divergence", ["js"]), ("reward", "head"),
    ("reward.layers", 0.5), ("reward.layers.0", "last"), ("reward.divergence", 3), ("reward.l2", None),
    ("policy", [1]), ("policy.max_steps", "ten"), ("policy.model", 3), ("policy.learning_rate", True),
    ("policy.num_generations", None), ("evaluate", True), ("evaluate.divergences", "js"),
    ("evaluate.divergences.0", 3), ("evaluate.num_prompts", "all"), ("objective", None), ("objective", 3),
    ("objective", []), ("target", None), ("target", [1]), ("estimator", False), ("divergence", None),
    ("divergence", 3), ("divergence", ["js"]), ("divergence", {}), ("scorers", None), ("scorers", []),
    ("scorers", "reward_model"), ("scorers.reward", None), ("scorers.reward", 3), ("evaluate.lm_eval", "arc_easy"),
]  # fmt: skip
WRONG_VALUE = [
    ("name", ""), ("name", "a/b"), ("name", ".."), ("name", "."), ("name", "a b"), ("seed", -1), ("seed", 2**70),
    ("output_dir", ""), ("stages", []), ("model.name_or_path", ""), ("model.lora.r", 0), ("model.lora.lora_alpha", 0),
    ("data.sft_train", ""), ("sft.learning_rate", -1), ("sft.learning_rate", float("nan")), ("sft.max_length", 0),
    ("sft.per_device_train_batch_size", 0), ("sft.gradient_accumulation_steps", 0), ("reward.label_smoothing", 2),
    ("reward.layers", []), ("reward.layers.0", 3), ("reward.l2", -1), ("reward.batch_size", 0),
    ("reward.max_pairs", 0), ("reward.max_length", 0), ("policy.learning_rate", float("inf")),
    ("policy.max_steps", 0), ("policy.num_prompts", 0), ("policy.num_generations", 0),
    ("policy.max_completion_length", 0), ("policy.per_device_train_batch_size", 0), ("policy.warmup_steps", -1),
    ("policy.max_grad_norm", -1), ("policy.warmup_steps", 1), ("policy.save_steps", 0), ("policy.save_total_limit", 0),
    ("policy.warm_start_generations", -1), ("policy.weight_decay", -1), ("evaluate.num_prompts", 0),
    ("evaluate.num_generations", 0), ("evaluate.batch_size", 0), ("evaluate.samples", -1),
    ("evaluate.perplexity_rows", -1), ("evaluate.lm_eval_limit", 0),
]  # fmt: skip
WRONG_IN_A_CHOICE = [
    ("objective.beta", {"name": "regularise"}, "x"), ("objective.beta", {"name": "regularise"}, 0),
    ("objective.beta", {"name": "regularise"}, -1), ("objective.beta", {"name": "regularise"}, float("nan")),
    ("target.beta", {"name": "tilted"}, []), ("target.beta", {"name": "tilted"}, 0),
    ("target.beta", {"name": "tilted"}, float("nan")), ("target.beta", {"name": "tilted"}, float("inf")),
    ("target.reward", {"name": "tilted"}, 3), ("target.floor", {"name": "pointwise", "scorer": "reward"}, 1),
    ("target.floor", {"name": "pointwise", "scorer": "reward"}, -0.1), ("target.moments", {"name": "moments"}, {}),
    ("target.moments", {"name": "moments"}, 3), ("target.moments", {"name": "moments"}, {"reward": float("nan")}),
    ("target.num_prompts", {"name": "moments", "moments": {"reward": 1}}, 0),
    ("target.num_generations", {"name": "moments", "moments": {"reward": 1}}, 0),
    ("target.of", {"name": "product"}, []), ("target.of", {"name": "product"}, 3),
    ("target.of.0.beta", {"name": "tilted"}, 0), ("target.of.0.beta", {"name": "tilted"}, "x"),
    ("estimator.num_epochs", {"name": "ppo"}, 0), ("estimator.num_minibatches", {"name": "ppo"}, 0),
    ("estimator.clip_range", {"name": "ppo"}, "x"), ("estimator.clip_range", {"name": "ppo"}, -0.2),
    ("estimator.gamma", {"name": "ppo"}, 2), ("estimator.lam", {"name": "ppo"}, 2),
    ("estimator.clip_range", {"name": "grpo"}, 0), ("estimator.num_epochs", {"name": "grpo"}, 0),
    ("estimator.whiten_advantages", {"name": "ppo"}, "perhaps"), ("scorers.x.clip", {"name": "reward_model"}, 3),
    ("scorers.x.clip", {"name": "reward_model"}, [1]), ("scorers.x.clip", {"name": "reward_model"}, [4, -4]),
    ("scorers.x.batch_size", {"name": "reward_model"}, 0), ("scorers.x.data", {"name": "ngram_ridge"}, 3),
    ("scorers.x.alpha", {"name": "ngram_ridge", "data": "d"}, -1),
    ("scorers.x.clip", {"name": "ngram_ridge", "data": "d"}, [4, -4]), ("scorers.x.pattern", {"name": "pattern"}, 3),
    ("scorers.x.pattern", {"name": "pattern"}, "("),
    ("scorers.x.scale", {"name": "length"}, 0), ("scorers.x.scale", {"name": "length"}, "x"),
    ("scorers.x.of", {"name": "threshold"}, 3),
    ("scorers.x.above", {"name": "threshold", "of": "reward"}, float("nan")),
    ("scorers.x.path", {"name": "function"}, "os.path.join"), ("scorers.x.path", {"name": "function"}, "a:b:c"),
    ("scorers.x.path", {"name": "function"}, ".a:b"),
]  # fmt: skip
WRONG_IN_A_DIVERGENCE = [
    ("alpha", {"name": "alpha"}, "x"), ("alpha", {"name": "alpha"}, [1]), ("alpha", {"name": "alpha"}, float("nan")),
    ("w", {"name": "skew_js"}, 2), ("w", {"name": "skew_js"}, [0.5]), ("unit_curvature", {"name": "js"}, "no"),
    ("unit_curvature", {"name": "tv"}, True), ("weights", {"name": "mixture"}, 3),
    ("weights", {"name": "mixture"}, ["a", 1]), ("components", {"name": "mixture"}, [3, "js"]),
    ("components", {"name": "mixture"}, ["jss", "tv"]), ("components", {"name": "mixture"}, "js"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG_TYPE + WRONG_VALUE, ids=str)
def test_a_wrong_type_or_value_in_a_section_is_one_message_that_names_the_key(path, value):
    made = at(path, value)
    if path.startswith("model."):
        made["model"] = {"name_or_path": "m"} | made["model"]
    (message,) = problems(parse, made)
    assert message.startswith((f"{path}: ", f"{path}.name: "))
    assert "object is not" not in message


@pytest.mark.parametrize(("path", "section", "value"), WRONG_IN_A_CHOICE, ids=str)
def test_a_wrong_type_or_value_in_a_choice_is_one_message_that_names_the_key(path, section, value):
    (message,) = problems(parse, nested(path, section, path.split(".")[-1], value))
    assert message.startswith((f"{path}: ", f"{path}."))


@pytest.mark.parametrize("place", ["divergence", "sft.divergence", "reward.divergence", "evaluate.divergences.0"])
@pytest.mark.parametrize(("key", "section", "value"), WRONG_IN_A_DIVERGENCE, ids=str)
def test_a_wrong_value_in_a_divergence_is_one_message_in_plain_words(place, key, section, value):
    (message,) = problems(parse, nested(f"{place}.{key}", section, key, value))
    assert message.startswith(place)
    assert key in message or "jss" in message
    assert not any(jargon in message for jargon in ("object of type", "not supported between", "object is not"))


@pytest.mark.parametrize(
    ("path", "section"),
    [
        ("model.name_or_path", {"dtype": "float32"}),
        ("target.moments", {"name": "moments"}),
        ("target.scorer", {"name": "pointwise"}),
        ("scorers.x.data", {"name": "ngram_ridge"}),
        ("scorers.x.pattern", {"name": "pattern"}),
        ("scorers.x.of", {"name": "threshold"}),
        ("scorers.x.path", {"name": "function"}),
    ],
)
def test_a_missing_required_key_is_named(path, section):
    made = at(path.rpartition(".")[0], section)
    if path.startswith("model"):
        made["model"] = section
    if path.startswith("scorers"):
        made["scorers"]["reward"] = "length"
    assert problems(parse, made) == (f"{path}: is required",)


@pytest.mark.parametrize(
    "path",
    [
        "builtins:int", "os:path", "torch:Tensor", "rlhf_fdiv.divergences:Divergence", "no_such_module:F", "math:pi",
        "..a:b", ":", "math:", "math:no_such_name",
    ],
)  # fmt: skip
def test_a_dotted_path_to_no_divergence_is_an_error_that_names_it(path):
    (message,) = problems(parse, raw(divergence=path))
    assert message.startswith("divergence")
    assert path in message


def test_the_stages_run_in_their_own_order_however_they_are_listed():
    assert parse(raw(stages=["policy", "sft", "sft"])).stages == ["sft", "policy"]


def test_every_mistake_of_every_section_is_named_at_once():
    wrong = {
        "name": "a/b",
        "bogus": 1,
        "seed": "a",
        "stages": ["polcy"],
        "model": {"dtype": "float33"},
        "data": {"sft_train": 3},
        "sft": {"learning_rat": 1, "max_steps": "x", "divergence": "jss"},
        "reward": {"method": "hed", "divergence": {"name": "skew_js", "w": 2}},
        "policy": {"num_generation": 1, "engine": "x"},
        "evaluate": {"samples": "x", "divergences": ["jss", "js", "tvv"]},
        "objective": "mach",
        "target": {"name": "tilted", "bet": 1, "beta": "x"},
        "estimator": "rlo",
        "scorers": {"a": "nothing", "b": {"name": "pattern", "pattern": 3}},
        "divergence": "jss",
    }
    named = {message.partition(":")[0] for message in problems(parse, wrong)}
    assert {"reward.divergence" if name.startswith("reward.divergence") else name for name in named} == {
        "name", "bogus", "seed", "stages.0", "model.name_or_path", "model.dtype", "data.sft_train", "sft.learning_rat",
        "sft.max_steps", "sft.divergence", "reward.method", "reward.divergence", "policy.num_generation",
        "policy.engine", "evaluate.samples", "evaluate.divergences.0", "evaluate.divergences.2", "objective.name",
        "target.bet", "target.beta", "estimator.name", "scorers.a.name", "scorers.b.pattern", "divergence",
    }  # fmt: skip


def test_load_names_the_file_in_every_problem(write):
    found = problems(load, write("mine.yaml", f"{WHOLE}bogus: 1\nother: 2\n"), ["seed=x"])
    assert len(found) == 3
    assert all("mine.yaml: " in p for p in found)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.floats(allow_nan=False),
    st.text(max_size=4),
    st.sampled_from([*divergences.names(), *OBJECTIVES, *TARGETS, *ESTIMATORS, *SCORERS, *STAGES, "reward"]),
)
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("name") | LEAVES, inner, max_size=3),
    max_leaves=5,
)


CLASSES = {key: [cls] for key, cls in configs.checks._SECTIONS.items()} | {
    "objective": list(OBJECTIVES.values()),
    "target": list(TARGETS.values()),
    "estimator": list(ESTIMATORS.values()),
    "divergence": [type(divergences.get(name)) for name in divergences.names()],
}


@st.composite
def any_config(draw):
    """Anything under any key, and sections and choices with their own keys and anything in them."""
    keys = st.sampled_from([field.name for field in dataclasses.fields(RunConfig)]) | LEAVES
    made = draw(st.dictionaries(keys, NESTED, max_size=2))
    for key in draw(st.lists(st.sampled_from([*CLASSES, "scorers"]), max_size=2)):
        cls = draw(st.sampled_from(CLASSES.get(key, list(SCORERS.values()))))
        fields = (
            [field.name for field in dataclasses.fields(cls) if field.init] if dataclasses.is_dataclass(cls) else []
        )
        values = draw(st.dictionaries(st.sampled_from(fields), NESTED, max_size=3)) if fields else {}
        if isinstance(name := getattr(cls, "name", None), str):
            values["name"] = name
        made[key] = {"reward": values} if key == "scorers" else values
    return made


@settings(max_examples=200, deadline=None)
@given(any_config())
@example({"policy": {"num_generations": 0}})
@example({"divergence": {"name": "mixture", "weights": 3}})
@example({"name": "1e5"})
def test_no_values_raise_anything_but_a_user_error_and_what_passes_comes_back(changes):
    for values in ({**RAW, **changes}, changes):
        try:
            config = parse(values)
        except UserError as error:
            assert all(isinstance(p, str) and p for p in error.problems)  # noqa: PT017
            continue
        assert parse(to_dict(config)) == config
        assert divergences.get(config.divergence) == config.f


# conflicts


@pytest.mark.parametrize("f", ["reverse_kl", "pearson_chi2", {"name": "alpha", "alpha": 1.5}, "jeffreys", "mixture"])
@pytest.mark.parametrize("inside", [False, True])
def test_an_f_of_infinite_slope_is_refused_where_the_target_has_zeros(f, inside):
    point = {"name": "pointwise", "scorer": "reward"}
    target = {"name": "product", "of": ["tilted", point]} if inside else point
    (message,) = problems(parse, raw(divergence=f, target=target))
    assert message.startswith("divergence: ")
    assert "f'(∞)" in message
    assert "floor" in message
    point["floor"] = 0.01
    parse(raw(divergence=f, target=target))


@pytest.mark.parametrize("f", ["forward_kl", "js", "tv", "hellinger", "neyman_chi2", {"name": "alpha", "alpha": 0.5}])
def test_an_f_of_finite_slope_matches_a_target_with_zeros_and_regularise_does_not(f):
    point = {"name": "pointwise", "scorer": "reward"}
    parse(raw(divergence=f, target=point))
    assert "floor" in problems(parse, raw(divergence=f, target=point, objective="regularise"))[0]


@pytest.mark.parametrize("f", ["pearson_chi2", "tv", {"name": "alpha", "alpha": 2.0}])
def test_prefer_refuses_an_f_without_a_barrier_at_zero(f):
    (message,) = problems(parse, raw(divergence=f, objective="prefer"))
    assert "prefer" in message
    assert "chi_mix" in message


def test_prefer_is_no_objective_of_the_policy_stage():
    for objective in ("prefer", "distil"):
        found = problems(parse, raw(objective=objective, divergence="forward_kl", stages=["policy"]))
        assert found == (f"objective: {objective} is not trained by the policy stage, but match or regularise is",)


@pytest.mark.parametrize(
    "f", ["reverse_kl", "pearson_chi2", "jeffreys", "chi_mix", "mixture", {"name": "alpha", "alpha": 1}]
)
def test_sft_refuses_an_f_that_is_infinite_on_data(f):
    (message,) = problems(parse, raw(sft={"divergence": f}))
    assert message.startswith("sft.divergence: ")
    assert "f'(∞)" in message
    parse(raw(sft={"divergence": f}, stages=["reward", "policy", "evaluate"]))


@pytest.mark.parametrize(("estimator", "least"), [("reinforce", 1), ("rloo", 2), ("grpo", 2), ("ppo", 1)])
def test_a_leave_one_out_baseline_needs_two_completions(estimator, least):
    policy = {"num_generations": 1}
    if least == 1:
        parse(raw(estimator=estimator, policy=policy))
    else:
        (message,) = problems(parse, raw(estimator=estimator, policy=policy))
        assert message.startswith("policy.num_generations: ")
        assert estimator in message


def test_a_batch_holds_whole_groups():
    policy = {"num_generations": 8, "per_device_train_batch_size": 12}
    assert problems(parse, raw(policy=policy))[0].startswith("policy.per_device_train_batch_size: ")
    parse(raw(policy={**policy, "per_device_train_batch_size": 24}))


@pytest.mark.parametrize(
    ("target", "scorers"),
    [
        ({"name": "tilted", "reward": "rewrd"}, None),
        ({"name": "pointwise", "scorer": "rewrd", "floor": 0.1}, None),
        ({"name": "moments", "moments": {"rewrd": 0.5}}, None),
        ({"name": "product", "of": ["tilted", {"name": "tilted", "reward": "rewrd"}]}, None),
        ("tilted", {"reward": {"name": "threshold", "of": "rewrds"}, "rewards": "length"}),
    ],
)
def test_an_unknown_scorer_is_named_with_what_was_meant(target, scorers):
    (message,) = problems(parse, raw(target=target, **({"scorers": scorers} if scorers else {})))
    assert "rewrd" in message
    assert f"did you mean {'rewards' if scorers else 'reward'!r}?" in message
    assert message.startswith("scorers.reward.of: " if scorers else "target")


@pytest.mark.parametrize("cycle", ["a", "ab", "abc"])
def test_thresholds_in_a_circle_are_refused_and_no_scorer_is_proposed_for_itself(cycle):
    ring = {a: {"name": "threshold", "of": b} for a, b in zip(cycle, cycle[1:] + cycle[0], strict=True)}
    outside = {"reward": {"name": "threshold", "of": "a"}}
    for message in problems(parse, raw(scorers=ring | outside)):
        assert message.startswith("scorers.")
        assert "did you mean" not in message


@pytest.mark.parametrize(
    ("stage", "key"),
    [("sft", "sft_train"), ("reward", "preferences_train"), ("policy", "prompts_train"), ("evaluate", "prompts_eval")],
)
def test_a_stage_names_the_data_that_it_needs_and_no_other(stage, key):
    without = {k: v for k, v in DATA.items() if k != key}
    (message,) = problems(parse, raw(data=without))
    assert message.startswith(f"data.{key}: ")
    assert stage in message
    assert parse(raw(data={key: "rows.jsonl"}, stages=[stage])).stages == [stage]


def test_a_product_holds_one_moments_target():
    moments = {"name": "moments", "moments": {"reward": 0.5}}
    assert problems(parse, raw(target={"name": "product", "of": [moments, moments]}))[0].startswith("target")


def test_all_conflicts_are_named_at_once():
    found = problems(
        parse,
        raw(
            data={},
            target={"name": "tilted", "reward": "rewrd"},
            sft={"divergence": "reverse_kl"},
            policy={"num_generations": 1},
        ),
    )
    assert [p.partition(":")[0] for p in sorted(found) if p.startswith("data")] == sorted(f"data.{k}" for k in DATA)
    for start in ("target", "sft.divergence: ", "policy.num_generations: "):
        assert any(p.startswith(start) for p in found), start


# and back


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_comes_back_from_plain_values_and_from_yaml(path, tmp_path):
    config = load(path)
    assert parse(to_dict(config)) == config
    (tmp_path / "dumped.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "dumped.yaml") == config
    assert yaml.safe_load(dump(config)) == to_dict(config)


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, options in CHOICES.items() for v in options])
def test_every_choice_comes_back_from_plain_values_and_from_yaml(key, value, write):
    trains = OBJECTIVES[value["name"]].stage if key == "objective" else "policy"
    values = raw(**{"stages": [trains], "distil": {"teacher": "t"}, key: value})
    before = copy.deepcopy(values)
    config = parse(values)
    assert values == before
    assert parse(to_dict(config)) == config
    assert load(write("a.yaml", dump(config))) == config


def test_the_choices_above_leave_none_out():
    def chosen(key):
        return {v if isinstance(v, str) else v["name"] for v in CHOICES[key]}

    assert (chosen("target"), chosen("estimator")) == (TARGETS.keys(), ESTIMATORS.keys())
    assert chosen("objective") == OBJECTIVES.keys()
    named = {s if isinstance(s, str) else s["name"] for scorers in CHOICES["scorers"] for s in scorers.values()}
    assert named == SCORERS.keys()


@pytest.mark.slow
@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), st.floats(1e-300, 1e300))
@example("1e-4", 1e-6)
@example("1e5", 1e16)
@example("null", 0.1)
@example("2020-01-01", 0.1)
@example("<<", 0.1)
@example("a\x85b\u2028", 0.1)
def test_any_text_and_number_comes_back_from_yaml(tmp_path_factory, text, number):
    scorers = {"reward": {"name": "ngram_ridge", "data": text}, text: "length"}
    assume(not check_scorers(scorers, ()))  # such as `step`, which a figure has
    config = parse(raw(model={"name_or_path": text}, scorers=scorers, target={"name": "tilted", "beta": number}))
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    assert load(path) == config


def test_a_run_may_be_named_like_a_number(write):
    assert load(write("1e-4.yaml", yaml.safe_dump({k: v for k, v in RAW.items() if k != "name"}))).name == "1e-4"
    assert load(write("b.yaml", dump(parse(raw(name="1e-4"))))).name == "1e-4"


def test_the_name_is_the_files_unless_given(write):
    text = yaml.safe_dump({k: v for k, v in RAW.items() if k != "name"})
    assert load(write("mine.yaml", text)).name == "mine"
    assert load(write("mine.yaml", text), ["name=other"]).name == "other"


def test_what_a_user_named_like_a_free_key_is_not_free():
    old, new = ({"scorers": {"resume": {"name": "length", "scale": x}}, "policy": {"vllm": x}} for x in (1.0, 5.0))
    assert differences(old, new, ("resume", "policy.vllm")) == ["scorers.resume.scale: 1.0 → 5.0"]


@pytest.mark.parametrize("key", ["reuse", "push_to_hub", "output_dir"])
def test_a_name_may_not_be_empty(key):
    assert problems(parse, raw(f"{key}=''"))[0].startswith(f"{key}: ")


def test_differences_name_each_key_with_old_and_new():
    old = to_dict(parse(raw()))
    new = to_dict(parse(raw("seed=3", "policy.max_steps=7", "divergence=js", "model.lora.r=2")))
    assert differences(old, old) == []
    assert differences(old, new, ignore=("seed",)) == [
        "model.lora: None → {'r': 2, 'lora_alpha': 32, 'target_modules': 'all-linear'}",
        "divergence: {'name': 'reverse_kl'} → {'name': 'js'}",
        "policy.max_steps: 100 → 7",
    ]


def test_the_schema_is_json_and_names_every_section_choice_and_field():
    made = json.loads(json.dumps(schema(), allow_nan=False))
    assert {f.name for f in dataclasses.fields(RunConfig)} <= made.keys()
    for key, cls in configs.checks._SECTIONS.items():
        assert made[key]["properties"].keys() == {f.name for f in dataclasses.fields(cls)}
    registries = {"objective": OBJECTIVES, "target": TARGETS, "estimator": ESTIMATORS, "scorers": SCORERS}
    for key, registry in registries.items():
        assert made[key].keys() == registry.keys()
    assert made["divergence"] == divergences.names()


def test_checking_a_config_loads_no_model_library():
    code = (
        "import sys; from rlhf_fdiv import config; config.load(sys.argv[1]);"
        "print([m for m in ('transformers', 'trl', 'peft', 'accelerate', 'datasets', 'sklearn') if m in sys.modules])"
    )
    made = subprocess.run([sys.executable, "-c", code, str(CONFIGS[0])], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("gpu", "capabilities", "dtype"),
    [(False, {"avx2": True}, "float32"), (False, {"avx2": True, "avx512_bf16": True}, "bfloat16"),
     (False, {"amx_bf16": True}, "bfloat16"), (True, {}, "bfloat16")],
)  # fmt: skip
def test_auto_is_the_dtype_that_the_machine_is_fast_in(monkeypatch, gpu, capabilities, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    config = parse(RAW | {"model": {"name_or_path": "m", "dtype": "auto"}})
    assert config.model.dtype == dtype == to_dict(config)["model"]["dtype"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert parse(to_dict(config)) == config, "what is written down stays, whatever machine goes on with it"
