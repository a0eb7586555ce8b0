"""Parts of a user's own by dotted path: those of docs/examples, and every way in which a path can be wrong."""

import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tiny import problems
from torch import Tensor

from rlhf_fdiv import divergences
from rlhf_fdiv.config import load, parse, to_dict
from rlhf_fdiv.config.files import with_overrides
from rlhf_fdiv.parts import named
from rlhf_fdiv.rewards import Function
from rlhf_fdiv.scoring import Scorers
from rlhf_fdiv.targets import Tilted

ROOT = Path(__file__).parent.parent
RAW = {"name": "x", "model": "m", "stages": ["policy"], "data": {"prompts_train": "rows.jsonl"}}
ME = __name__


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The current folder is a copy of docs/examples, as it lies under the configs that it builds on."""
    for folder in ("docs/examples", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    monkeypatch.chdir(tmp_path / "docs/examples")
    monkeypatch.syspath_prepend(tmp_path / "docs/examples")
    yield
    sys.modules.pop("my_parts", None)


@pytest.mark.slow
def test_the_commands_of_the_page_run_as_they_stand_there(examples, call):
    page = (ROOT / "docs/your_own_parts.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\ncd docs/examples\n(.*?)```", page, re.DOTALL)
    for line in block.splitlines():
        code, *_ = call(*line.removeprefix("rlhf-fdiv ").split())
        assert code == 0, line
    assert "le_cam" in Path("runs/my_parts/report.md").read_text(encoding="utf-8")


def test_the_examples_are_taken_by_path_with_their_parameters_and_come_back(examples):
    config = load("my_parts.yaml", [])
    my = sys.modules["my_parts"]
    assert (config.target, config.estimator) == (my.CappedTilt("sum", beta=0.2), my.LeaveOneOutOfBatch())
    assert (config.beta, divergences.check(config.f)) == (0.2, [])
    assert config.scorers["sum"] == Function("my_parts:adds_up")
    assert parse(to_dict(config)) == config
    assert to_dict(config)["target"] == {"name": "my_parts:CappedTilt", "reward": "sum", "beta": 0.2, "cap": 1.0}
    potential = config.target.potential({"sum": torch.tensor([0.0, 1.0, 3.0])})
    assert potential.tolist() == pytest.approx([0, 5, 5])
    assert my.adds_up(["x"] * 3, ["a b", "d d c b .", ""], [3, 12, 1]) == [1, 0, 0]


def test_the_baseline_of_the_example_is_the_mean_of_all_others(examples):
    scores, ones = torch.tensor([[1.0, 2.0], [4.0, 9.0]]), torch.ones(2, 2)
    found = load("my_parts.yaml", []).estimator.advantage(scores, ones)
    assert torch.allclose(found, torch.tensor([[1 - 5, 2 - 14 / 3], [4 - 4, 9 - 7 / 3]]))


@dataclass(frozen=True)
class Longest:
    """A scorer with a parameter."""

    scale: float = 1.0

    def open(self, device):
        return lambda prompts, completions, **columns: [len(c) / self.scale for c in completions]


@dataclass(frozen=True)
class NoTarget:
    scorers: tuple[str, ...]


@dataclass(frozen=True)
class Unreadable(Tilted):
    tensor: Tensor = field(default_factory=lambda: torch.zeros(()))


def praise(prompts, completions):
    return [float("good" in c) for c in completions]


def test_a_scorer_is_a_function_or_a_class_by_its_path():
    made = {
        "f": f"{ME}:praise",
        "g": {"type": f"{ME}:praise", "num_workers": 2},
        "h": {"name": f"{ME}:Longest", "scale": 2},
    }
    config = parse({**RAW, "scorers": {"reward": "length", **made}})
    assert config.scorers["g"] == Function(f"{ME}:praise", num_workers=2)
    found = Scorers(config.scorers, torch.device("cpu"))(["f", "g", "h"], prompts=["", ""], completions=["good", "so"])
    assert {name: x.tolist() for name, x in found.items()} == {"f": [1, 0], "g": [1, 0], "h": [2, 1]}
    assert parse(to_dict(config)) == config


def test_a_part_of_a_product_may_be_ones_own(examples):
    of = ["tilted", {"type": "my_parts:CappedTilt", "reward": "b"}]
    config = parse({**RAW, "scorers": {"reward": "length", "b": "length"}, "target": {"type": "product", "of": of}})
    assert config.target.scorers == ("reward", "b")
    assert parse(to_dict(config)) == config


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("target", "no_such_module:T", "target: cannot load 'no_such_module:T': No module named"),
        (
            "target",
            f"{ME}:NoTarge",
            f"target: cannot load '{ME}:NoTarge': module '{ME}' has no attribute 'NoTarge'; did you mean 'NoTarget'?",
        ),
        ("target", f"{ME}:NoTarget", f"target: '{ME}:NoTarget' is no dataclass with has_zeros, potential"),
        ("target", "torch:Tensor", "target: 'torch:Tensor' is no dataclass with scorers, has_zeros, potential"),
        ("target", f"{ME}:Unreadable", f"target: '{ME}:Unreadable' has a field that cannot be checked"),
        ("target", {"name": "my_parts:CappedTilt", "bta": 1}, "target.bta: unknown key; did you mean 'beta'?"),
        ("target", {"name": "my_parts:CappedTilt", "beta": "x"}, "target.beta: "),
        ("estimator", f"{ME}:Longest", f"estimator: '{ME}:Longest' is no dataclass with num_epochs, clip_range"),
        ("objective", f"{ME}:Longest", f"objective.name: '{ME}:Longest' is not known"),
        ("divergence", f"{ME}:Longest", f"divergence: '{ME}:Longest' is no subclass"),
        (
            "divergence",
            "my_parts:LeCan",
            "divergence: cannot load 'my_parts:LeCan': module 'my_parts' has no attribute 'LeCan'; did you mean",
        ),
        (
            "scorers.a",
            f"{ME}:prais",
            f"scorers.a: cannot load '{ME}:prais': module '{ME}' has no attribute 'prais'; did you mean 'praise'?",
        ),
        ("scorers.a", f"{ME}:ROOT", f"scorers.a: '{ME}:ROOT' is no dataclass with open"),
        ("scorers.a", {"name": f"{ME}:praise", "num_worker": 2}, "scorers.a.num_worker: unknown key; did you mean"),
        (
            "scorers.a",
            {"name": f"{ME}:praise", "path": "b:c"},
            "scorers.a: `path` and the name are one key here, and",
        ),
        ("scorers.a", {"name": f"{ME}:Longest", "scal": 2}, "scorers.a.scal: unknown key; did you mean 'scale'?"),
    ],
)
def test_what_cannot_be_a_part_is_named_by_key_before_anything_is_loaded(examples, key, value, told):
    section, _, name = key.partition(".")
    raw = {**RAW, "scorers": {"reward": "length"}}
    raw[section] = {"reward": "length", name: value} if name else value
    (message,) = problems(parse, raw)
    assert message.startswith(told)


# name and type

BASE = {**RAW, "scorers": {"reward": "length", "b": {"type": "pattern", "pattern": "x"}}}


@pytest.mark.parametrize(
    "keys",
    [
        {"target": {"type": "pointwise", "scorer": "b"}},
        {"target": {"name": "pointwise", "type": "pointwise", "scorer": "b"}},
        {"target": {"type": "product", "of": [{"type": "pointwise", "scorer": "b"}]}},
        {"estimator": {"type": "ppo", "lam": 1.0}},
        {"objective": {"type": "regularise", "beta": 0.5}},
        {"divergence": {"type": "mixture", "components": ["js", {"type": "alpha", "alpha": 2}], "weights": [1, 0.1]}},
        {"sft": {"divergence": {"type": "alpha", "alpha": 0.5}}},
        {"evaluate": {"divergences": [{"type": "alpha", "alpha": 0.5}]}},
    ],
)
def test_type_says_what_name_does(keys):
    def with_names(x):
        if isinstance(x, list):
            return [with_names(y) for y in x]
        return {"name" if k == "type" else k: with_names(y) for k, y in x.items()} if isinstance(x, dict) else x

    base = {**BASE, "divergence": "js"} | keys
    ours, theirs = parse(base), parse(with_names(base))
    assert [divergences.get(f) for f in ours.evaluate.divergences] == [
        divergences.get(f) for f in theirs.evaluate.divergences
    ]
    assert ours.f == theirs.f
    assert {**vars(ours), "evaluate": 0, "divergence": 0} == {**vars(theirs), "evaluate": 0, "divergence": 0}


def test_an_override_by_type_replaces_a_choice_by_name():
    raw = with_overrides({**BASE, "target": {"name": "tilted", "beta": 3}}, ["target={type: pointwise, scorer: b}"])
    assert raw["target"] == {"name": "pointwise", "scorer": "b"}
    assert with_overrides(raw, ["target.type=pointwise"]) == raw


@pytest.mark.parametrize(("key", "at"), [("target", "target"), ("of", "target.of.0"), ("divergence", "divergence")])
def test_a_name_and_another_type_are_an_error(key, at):
    both = {"name": "tilted", "type": "moments"}
    raw = {**BASE, **({"target": {"name": "product", "of": [both]}} if key == "of" else {key: both})}
    (message,) = problems(parse, raw)
    assert message == f"{at}: `name` and `type` are one key, and say 'tilted' and 'moments' here"
    with pytest.raises(ValueError, match="'tilted' and 'moments'"):
        named(both)
