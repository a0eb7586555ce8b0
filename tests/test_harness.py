"""lm-eval tasks and MAUVE in evaluate: what they say of the loaded models, and what is said before any is loaded."""

import importlib.util
import json
import sys

import pytest
import tiny
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fdiv import metrics
from rlhf_fdiv.data import reference_texts
from rlhf_fdiv.errors import UserError

CHOICES = ["the plot is good", "the plot is bad"]


def installed(module):
    reason = f"{module} is not installed: pip install 'rlhf_fdiv[eval]'"
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=reason)


@pytest.fixture
def task(tmp_path):
    """A local task file: which of two reviews of a film is likelier."""
    rows = tiny.write_rows(
        tmp_path / "films.jsonl", [{"film": film, "gold": i % 2} for i, film in enumerate(tiny.FILMS)]
    )
    path = tmp_path / "reviews.yaml"
    path.write_text(yaml.safe_dump({
        "task": "reviews", "dataset_path": "json", "dataset_kwargs": {"data_files": rows}, "test_split": "train",
        "output_type": "multiple_choice", "doc_to_text": "film : {{film}} review :", "doc_to_target": "gold",
        "doc_to_choice": CHOICES, "metric_list": [{"metric": "acc"}],
    }))  # fmt: skip
    return str(path)


@pytest.fixture
def config(start, data, tmp_path):
    raw = tiny.raw_config(start, data, tmp_path / "runs") | {"stages": ["policy", "evaluate"], "report_to": "none"}
    raw["scorers"] = {"praise": {"name": "pattern", "pattern": tiny.PATTERN}}
    raw["target"] = {"name": "tilted", "reward": "praise", "beta": 0.5}
    raw["policy"] |= {"model": start, "learning_rate": 0.1}
    return tiny.write_config(tmp_path / "run.yaml", raw)


def accuracy(folder, examples):
    """By plain transformers: how often the gold review has the larger log-prob."""
    lm, tok = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    right = []
    for i, film in enumerate(tiny.FILMS[:examples]):
        prompt, log_p = tok(f"film : {film} review :")["input_ids"], []
        for choice in CHOICES:
            ids = tok(choice)["input_ids"]
            with torch.no_grad():
                logits = lm(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            log_p.append(float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()))
        right.append(log_p[i % 2] > log_p[1 - i % 2])
    return sum(right) / len(right)


@installed("lm_eval")
@pytest.mark.slow
def test_a_local_task_is_measured_before_and_after_on_the_loaded_models(config, task, start, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tiny.run(config, f"evaluate.lm_eval=[{task}]", "evaluate.lm_eval_limit=11").path
    report = json.loads((folder / "evaluate" / "metrics.json").read_text())["lm_eval"]
    for name, model in (("sft", start), ("policy", folder / "policy" / "model")):
        share = accuracy(model, 11)
        assert report[name]["reviews.acc"] == pytest.approx(share)
        assert report[name]["reviews.acc_se"] == pytest.approx((share * (1 - share) / 10) ** 0.5)
    section = (folder / "report.md").read_text().partition("## lm-eval")[2].partition("\n## ")[0]
    assert f"| reviews.acc | {report['sft']['reviews.acc']:.3g} ± " in section
    assert "first 11 examples" in section


@pytest.mark.slow
@installed("lm_eval")
@pytest.mark.parametrize(
    "text", ["task: [", "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: gone.json}\n", "- 3\n"]
)
def test_a_task_file_that_cannot_be_loaded_is_named_before_any_model_is(config, tmp_path, text, no_model):
    (path := tmp_path / "broken.yaml").write_text(text)
    (message,) = tiny.problems(tiny.run, config, f"evaluate.lm_eval=[{path}]")
    assert message.startswith(f"evaluate.lm_eval: {path} cannot be loaded: ")
    assert "\n" not in message
    (message,) = tiny.problems(tiny.run, config, "evaluate.lm_eval=[gone.yaml]")
    assert message == "evaluate.lm_eval: gone.yaml: no such task file"


@installed("lm_eval")
@pytest.mark.slow
def test_an_unknown_task_is_named(no_model, config):
    (message,) = tiny.problems(tiny.run, config, "evaluate.lm_eval=[helaswag]")
    assert message.startswith("evaluate.lm_eval: lm-eval has no task 'helaswag'")


@pytest.fixture
def no_model(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


@pytest.mark.parametrize(
    ("module", "override"), [("lm_eval", "evaluate.lm_eval=[x.yaml]"), ("mauve", "evaluate.mauve=true")]
)
def test_a_missing_package_is_named_with_its_command_before_any_model_is_loaded(
    config, module, override, monkeypatch, no_model
):
    monkeypatch.setitem(sys.modules, module, None)
    (message,) = tiny.problems(tiny.run, config, override)
    assert message == f"evaluate.{module}: needs the package {module}: pip install 'rlhf_fdiv[eval]'"


@pytest.mark.parametrize(
    "command", [("--lm-eval", "arc_easy,my/task.yaml"), ("evaluate.lm_eval=[arc_easy, my/task.yaml]",)]
)
def test_the_command_line_names_tasks(call, config, command):
    code, out, _ = call("evaluate", config, *command, "--print-config")
    assert code == 0
    assert yaml.safe_load(out)["evaluate"]["lm_eval"] == ["arc_easy", "my/task.yaml"]


@installed("mauve")
def test_mauve_tells_a_model_from_the_data_and_not_the_data_from_itself():
    one, two = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(0))
    assert metrics.mauve(one, two, 0) > 0.9
    assert metrics.mauve(one, two + 3, 0) < 0.1
    assert metrics.mauve(one, two, 0) == metrics.mauve(one, two, 0), "by a fixed seed"


@pytest.mark.slow
@installed("mauve")
def test_evaluate_reports_mauve_with_the_number_of_its_texts(config):
    folder = tiny.run(config, "evaluate.mauve=true", "evaluate.num_generations=8").path
    report = json.loads((folder / "evaluate" / "metrics.json").read_text())
    assert all(0 <= report[name]["mauve"] <= 1 for name in ("sft", "policy"))
    assert report["mauve_texts"] == 16, "eight prompts with two references each"
    text = (folder / "report.md").read_text()
    assert f"| mauve | {report['sft']['mauve']:.3g} | {report['policy']['mauve']:.3g} | – |" in text
    assert "MAUVE is of 16 texts a side" in text


def test_mauve_needs_held_out_texts(config, tmp_path, monkeypatch, no_model):
    monkeypatch.setattr(metrics, "require_harness", lambda *_: None)
    rows = tiny.write_rows(tmp_path / "plain.jsonl", [{"prompt": f"film : {film} review :"} for film in tiny.FILMS])
    words = ("evaluate.mauve=true", f"data.prompts_eval={rows}", "data.sft_eval=null")
    (message,) = tiny.problems(tiny.run, config, *words)
    assert message == f"evaluate.mauve: needs `references` in every row of {rows}, or data.sft_eval"


def test_held_out_texts_are_the_references_or_those_of_sft_eval(data):
    rows = [{"prompt": "a", "references": ["b", "c"]}, {"prompt": "d", "references": ["e"]}]
    found = [(row["prompt"], row["completion"]) for row in reference_texts(rows, data["sft_eval"])]
    assert found == [("a", "b"), ("a", "c"), ("d", "e")]
    assert len(reference_texts([*rows, {"prompt": "f"}], data["sft_eval"], 3)) == 3
    assert reference_texts([{"prompt": "f"}], None) == []
    with pytest.raises(UserError):
        reference_texts([{"prompt": "f"}], "gone.jsonl")
