"""Every text of a language: its log-probs, and figures without an estimate against those of samples."""

import json
import math

import pytest
import tiny
import torch
from toy import EOS, LENGTH, PROMPTS, TEXTS, VOCAB, exact_log_probs, language, perturbed
from transformers import AutoModelForCausalLM

from rlhf_fdiv import assets, metrics
from rlhf_fdiv.config import load
from rlhf_fdiv.data import PROMPTS as PROMPT
from rlhf_fdiv.data import read_rows
from rlhf_fdiv.models import load_tokenizer


def test_all_texts_are_those_of_the_language_once_each():
    assert sorted(metrics.all_texts(VOCAB, [EOS], LENGTH)) == sorted(TEXTS)
    assert len(metrics.all_texts(6, [1], 5)) == 3906


def test_too_many_texts_are_refused_with_their_number():
    with pytest.raises(ValueError, match="cannot be enumerated"):
        metrics.all_texts(50_000, [0], 2)


def test_their_log_probs_are_those_of_the_policy():
    _, policy, *_ = language()
    texts = metrics.all_texts(VOCAB, [EOS], LENGTH)
    found = metrics.log_probs_of_all(policy.lm, PROMPTS, texts, 50)
    order = [texts.index(text) for text in TEXTS]
    assert torch.allclose(found[:, order], exact_log_probs(policy), atol=1e-9)


def test_recall_and_precision_by_hand():
    log = lambda *x: torch.tensor([x], dtype=torch.float64).log()  # noqa: E731
    pi, a, p = log(0.9, 0.08, 0.02), log(0.5, 0.25, 0.25), log(0.3, 0.0, 0.7)
    found = metrics.exact_report([], pi, a, p, torch.tensor([[1.0, 0.0, 2.0]]))
    assert found["recall"] == pytest.approx(0.3), "π is a thirty-fifth of p on the third text"
    assert found["precision"] == pytest.approx(0.92)
    assert found["reward"] == pytest.approx(0.94)
    assert found["target"]["reward"] == pytest.approx(1.7)
    assert found["kl_reference"] == pytest.approx(0.9 * math.log(1.8) + 0.08 * math.log(0.32) + 0.02 * math.log(0.08))


def test_a_target_with_zeros_has_figures():
    log = lambda *x: torch.tensor([x], dtype=torch.float64).log()  # noqa: E731
    reward = torch.tensor([[1.0, -math.inf, 2.0]], dtype=torch.float64)
    found = metrics.exact_report([], log(0.9, 0.0, 0.1), log(0.5, 0.25, 0.25), log(0.5, 0.0, 0.5), reward)
    assert found["target"]["reward"] == pytest.approx(1.5)
    assert found["target"]["kl_reference"] == pytest.approx(0.5 * math.log(2))
    assert found["reward"] == pytest.approx(1.1)


def test_no_policy_is_above_the_frontier():
    """At every β the frontier's E[r] − β·KL is the largest that there is, and its own points lie on it."""
    generator = torch.Generator().manual_seed(0)
    log_pi, log_a = torch.randn(2, 3, 50, generator=generator, dtype=torch.float64).log_softmax(-1)
    reward = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    found = metrics.exact_report([], log_pi, log_a, (log_a + reward / 0.3).log_softmax(1), reward)
    rows = found["frontier"]
    for row in rows:
        best = row["reward"] - row["beta"] * row["kl_reference"]
        assert best == pytest.approx(float(row["beta"] * torch.logsumexp(log_a + reward / row["beta"], 1).mean()))
        assert best >= found["reward"] - row["beta"] * found["kl_reference"]
    assert [r["kl_reference"] for r in rows] == sorted((r["kl_reference"] for r in rows), reverse=True)
    assert metrics.exact_report([], log_pi, log_a, log_a, reward.where(reward < 1, -math.inf))["frontier"] == []


def test_the_toys_reward_has_its_modes():
    assert assets.toy_reward([], ["a b a b", "c c d d", "d b c a", "a b a b a", ""]) == [1.0, 0.9, 0.8, 0.8, 0.0]


@pytest.mark.slow
def test_a_toy_run_measures_without_an_estimate_what_its_samples_estimate(tmp_path):
    """Twelve steps; estimates are within four standard errors, and the divergences agree with the objective."""
    out = tiny.run("configs/toy.yaml", "policy.max_steps=12", "policy.save_steps=12", f"output_dir={tmp_path}",
                   "evaluate.num_generations=256")  # fmt: skip
    report = json.loads((out.path / "evaluate" / "metrics.json").read_text())
    exact, policy = report["exact"], report["policy"]
    beta = load("configs/toy.yaml").beta
    for name, value in (("modes", exact["reward"]), ("kl_reference", exact["kl_reference"])):
        assert policy[name] == pytest.approx(value, abs=4 * policy[f"{name}_se"])
    for side, known in (("reference", exact["to_reference"]), ("target", exact["to_target"])):
        for f, measured in report[f"divergence_to_{side}"].items():
            if not measured["reason"]:
                assert measured["value"] == pytest.approx(known[f], abs=4 * measured["standard_error"]), (side, f)
    assert exact["objective"] == pytest.approx(exact["reward"] - beta * exact["kl_reference"])
    gap = exact["target"]["reward"] - beta * exact["target"]["kl_reference"] - exact["objective"]
    assert gap == pytest.approx(beta * exact["to_target"]["reverse_kl"], abs=1e-5), "E[r] − β·KL is β·(log Z − KL(π‖p))"


def test_after_distil_the_target_is_the_teacher(tmp_path):
    teacher = perturbed(AutoModelForCausalLM.from_pretrained(assets.toy()), scale=0.03)
    teacher.save_pretrained(tmp_path / "teacher")
    load_tokenizer("toy").save_pretrained(tmp_path / "teacher")
    distil = f"distil={{teacher: {tmp_path}/teacher, max_steps: 2, max_completion_length: 5, num_prompts: 4}}"
    out = tiny.run("configs/toy.yaml", "objective=distil", "stages=[distil, evaluate]", distil, f"output_dir={tmp_path}",
                   "evaluate.num_generations=4")  # fmt: skip
    exact = json.loads((out.path / "evaluate" / "metrics.json").read_text())["exact"]
    prompts = load_tokenizer("toy")(
        [row["prompt"] for row in read_rows(load("configs/toy.yaml").data.prompts_eval, PROMPT)]
    )
    texts = metrics.all_texts(6, [load_tokenizer("toy").eos_token_id], 5)
    student = AutoModelForCausalLM.from_pretrained(out.path / "distil" / "model")
    log_pi, log_q = (
        metrics.log_probs_of_all(lm.eval(), prompts["input_ids"], texts, 1024) for lm in (student, teacher)
    )
    kl = float((log_pi.exp() * (log_pi - log_q)).sum(1).mean())
    assert exact["to_target"]["reverse_kl"] == pytest.approx(kl, rel=1e-3)
    assert kl > 1e-3


def test_what_cannot_be_enumerated_is_said(start, data, tmp_path):
    raw = tiny.raw_config(start, data, tmp_path / "runs") | {"stages": ["policy", "evaluate"], "report_to": "none"}
    raw["scorers"] = {"praise": {"name": "pattern", "pattern": tiny.PATTERN}}
    raw["target"] = {"name": "tilted", "reward": "praise"}
    raw["evaluate"]["exact"] = True
    raw["policy"]["max_steps"] = 1
    path = tiny.write_config(tmp_path / "run.yaml", raw)
    (message,) = tiny.problems(tiny.run, path)
    assert message.startswith("evaluate.exact: ")
    assert "cannot be enumerated" in message
