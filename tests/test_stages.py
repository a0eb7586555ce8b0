"""Whole stages end to end on a tiny model: what a run leaves behind, resume bit for bit, and mistakes told in time."""

import hashlib
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from tiny import (
    FILMS,
    PATTERN,
    away,
    completions,
    jsonl,
    model_folder,
    problems,
    run,
    same,
    two_processes,
    weights,
    without_time,
    write_config,
    write_rows,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    T5Config,
    pipeline,
)

from rlhf_fdiv import config as configs
from rlhf_fdiv import divergences
from rlhf_fdiv.models import load_tokenizer
from rlhf_fdiv.objectives import preference_divergence
from rlhf_fdiv.reward_models import fit_head, load_reward_model
from rlhf_fdiv.rewards import RESERVED
from rlhf_fdiv.rollout import sample, uniforms
from rlhf_fdiv.stages import policy as policy_stage
from rlhf_fdiv.stages import policy_update

FULL, LORA = "model.lora=null", "model.lora={r: 2, lora_alpha: 4}"
NAMES = divergences.names()


@pytest.fixture(scope="module")
def whole(start, data, tmp_path_factory):
    """(config file, run folder) of one run of all stages; tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_config(folder / "whole.yaml", tiny.raw_config(start, data, folder / "runs"))
    return path, run(path).path


def test_no_scorer_can_take_the_name_of_a_figure(whole, config):
    _, folder = whole
    scorers = tiny.raw_config("", {"gold": ""}, folder)["scorers"]
    report = json.loads((folder / "evaluate/metrics.json").read_text(encoding="utf-8"))
    logged = {*report["policy"], *jsonl(folder / "policy/metrics.jsonl")[-1], *completions(folder / "policy")}
    logged |= {key for row in report["inference"] for key in row}
    ours = {key.removesuffix("_se") for key in logged} - {*scorers, "references"}
    assert {key for key in ours if "." not in key} <= RESERVED
    for name in RESERVED:
        mine = {**scorers, name: {"name": "length"}}
        assert f"scorers.{name}: a figure" in problems(configs.load, config(scorers=mine))[0]


def test_a_tracker_without_its_package_is_named_before_anything_runs(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None)
    assert "report_to: wandb is not installed: pip install 'rlhf_fdiv[tracking]'" in problems(
        run, config(), "report_to=wandb"
    )


@pytest.mark.slow
def test_a_run_tells_wandb_what_it_writes(policy, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = policy("report_to=wandb", "policy.save_steps=2", "policy.max_steps=2")
    (written,) = out.glob("wandb/offline-run-*/run-*.wandb")
    assert all(key.encode() in written.read_bytes() for key in jsonl(out / "metrics.jsonl")[-1])
    assert [*out.glob("wandb/offline-run-*/files/media/table/completions_*.json")]


@pytest.fixture
def config(start, data, tmp_path):
    """config(**top-level keys): a config file of all stages in a folder of its own."""

    def config(**changes):
        return write_config(tmp_path / "tiny.yaml", tiny.raw_config(start, data, tmp_path / "runs") | changes)

    return config


@pytest.fixture
def policy(start, data, tmp_path):
    """policy("a.b=value", …): runs the policy stage alone, from the untouched model, and gives its folder."""
    raw = tiny.raw_config(start, data, tmp_path / "runs")
    scorers = {"praise": {"name": "pattern", "pattern": PATTERN}, "words": {"name": "length", "scale": 4}}
    raw |= {"stages": ["policy"], "scorers": scorers, "report_to": "none"}
    raw["policy"]["model"] = start
    raw["target"] = {"name": "tilted", "reward": "praise", "beta": 0.5}
    path = write_config(tmp_path / "policy.yaml", raw)

    def policy(*overrides):
        return run(path, *overrides).path / "policy"

    policy.path = path
    return policy


def tree(folder):
    """Every file with its hash and time of change."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files
    }


def module(tmp_path, monkeypatch, text, name):
    """A user's module on sys.path."""
    folder = tmp_path / "theirs"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def checked(out, steps=2, loose=()):
    """The rows of a policy stage, each figure finite unless it may be withheld."""
    rows = jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, steps + 1)]
    may_be_withheld = {"divergence_target", *loose}
    for row in rows:
        measured = {k: v for k, v in row.items() if not k.startswith("to_target.")}
        assert len(measured) < len(row)
        assert not [k for k, v in measured.items() if v is None and k not in may_be_withheld]
        assert {
            "objective",
            "kl_reference",
            "divergence_target",
            "log_z",
            "ess_log_z",
            "entropy",
            "loss",
            "grad_norm",
        } <= (row.keys())
        assert 0 < row["entropy"] <= math.log(len(tiny.WORDS))
        assert 0 <= row["ess_log_z"] <= 4 + 1e-5
        assert 1 <= row["length"] <= 6
    assert abs(rows[0]["kl_reference"]) <= 1e-4 or "kl_reference" in loose, "D(π‖a) = 0 before the first update"
    assert all(w.isfinite().all() for w in weights(out / "model").values())
    return rows


# -- 1. the run folder -------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_one_wants_to_read(whole):
    _, folder = whole
    for stage in ("sft", "reward", "policy"):
        assert jsonl(folder / stage / "metrics.jsonl"), stage
        assert list((folder / stage / "tensorboard").glob("events.out.tfevents.*")), stage
    completions = pd.concat(pd.read_parquet(p) for p in sorted((folder / "policy" / "completions").glob("*.parquet")))
    assert completions["step"].value_counts().to_dict() == dict.fromkeys((1, 2, 3, 4), 16)
    assert {"prompts", "completions", "references", "reward"} <= set(completions)
    for name in ("training", "before_and_after"):
        assert (folder / "evaluate" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "evaluate" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    report = (folder / "report.md").read_text()
    for link in ("evaluate/training.png", "evaluate/before_and_after.png"):
        assert f"]({link})" in report
    assert "| gold |" in report
    assert "reverse_kl" in report
    assert len(pd.read_parquet(folder / "evaluate" / "samples.parquet")) == 8 * 4


def test_the_resolved_config_is_the_config_again(whole):
    path, folder = whole
    from rlhf_fdiv import config as configs

    again = configs.load(folder / "resolved_config.yaml")
    assert configs.to_dict(again) == configs.to_dict(configs.load(path))
    assert again.name == "whole"


def test_the_manifest_says_what_the_run_was_made_with(whole, data):
    _, folder = whole
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["versions"].keys() >= {"python", "torch", "transformers", "trl", "accelerate", "peft", "rlhf_fdiv"}
    assert manifest["seed"] == 0
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert manifest["git_commit"] == (head.stdout.strip() or None)
    assert manifest["wall_seconds"].keys() == {"sft", "reward", "policy", "evaluate"}
    assert all(seconds >= 0 for seconds in manifest["wall_seconds"].values())
    for key, path in data.items():
        if key != "gold":
            assert manifest["data_sha256"][key] == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_manifest_has_the_hash_of_the_data_that_a_scorer_is_fitted_on(whole, data):
    hashes = json.loads((whole[1] / "manifest.json").read_text())["data_sha256"]
    assert hashlib.sha256(Path(data["gold"]).read_bytes()).hexdigest() in hashes.values()


def test_the_policy_metrics_obey_their_definitions(whole):
    rows = jsonl(whole[1] / "policy" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    completions = pd.concat(
        pd.read_parquet(p) for p in sorted((whole[1] / "policy" / "completions").glob("*.parquet"))
    ).groupby("step")
    for row in rows:
        assert row["objective"] == pytest.approx(row["reward"] - 0.5 * row["kl_reference"], abs=1e-4)
        assert row["reward"] == pytest.approx(completions.get_group(row["step"])["reward"].mean(), abs=1e-4)
    assert rows[0]["kl_reference"] == pytest.approx(0, abs=1e-4)


def test_tensorboard_holds_the_figures_of_the_jsonl(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole[1] / "policy" / "tensorboard")).Reload()
    for key in ("objective", "reward", "kl_reference", "grad_norm"):
        shown = [(e.step, e.value) for e in events.Scalars(key)]
        assert [s for s, _ in shown] == [1, 2, 3, 4]
        assert [v for _, v in shown] == pytest.approx(
            [row[key] for row in jsonl(whole[1] / "policy" / "metrics.jsonl")], rel=1e-4, abs=1e-6
        )


def test_the_evaluation_adds_up(whole):
    _, folder = whole
    report = json.loads((folder / "evaluate" / "metrics.json").read_text())
    needed = {"reward", "gold", "kl_reference", "objective", "distinct_2", "entropy", "self_bleu", "perplexity", "bleu",
              "rouge_l", "praise", "positive"}  # fmt: skip
    assert report["sft"].keys() >= needed
    assert report["policy"].keys() >= needed
    assert all(isinstance(report[m][k], float) for m in ("sft", "policy") for k in needed)
    assert report["beta"] == 0.5
    assert report["prompts"] == len(pd.read_parquet(folder / "evaluate" / "samples.parquet")["prompt"].unique()) == 8
    assert "Of 8 prompts it is itself rough." in (folder / "report.md").read_text()
    for model in ("sft", "policy"):
        values = report[model]
        assert values["objective"] == pytest.approx(values["reward"] - 0.5 * values["kl_reference"], abs=1e-6)
    assert report["sft"]["kl_reference"] == 0
    assert report["policy"]["kl_reference"] > 0
    table = pd.read_parquet(folder / "evaluate" / "samples.parquet")
    for scorer in ("reward", "gold", "praise", "positive", "objective"):
        gain, error = report["paired"][f"{scorer}_gain"], report["paired"][f"{scorer}_gain_se"]
        assert gain == pytest.approx(report["policy"][scorer] - report["sft"][scorer], abs=1e-6)
        assert error >= 0
        if scorer != "objective":
            difference = table[f"policy_{scorer}"] - table[f"sft_{scorer}"]
            by_prompt = difference.groupby(table["prompt"]).mean()
            assert gain == pytest.approx(difference.mean(), abs=1e-5)
            assert error == pytest.approx(by_prompt.std(ddof=1) / math.sqrt(len(by_prompt)), rel=1e-3)
            for model in ("sft", "policy"):
                values = table[f"{model}_{scorer}"]
                by_prompt = values.groupby(table["prompt"]).mean()
                assert report[model][scorer] == pytest.approx(values.mean(), abs=1e-5)
                expected = by_prompt.std(ddof=1) / math.sqrt(len(by_prompt))
                assert report[model][f"{scorer}_se"] == pytest.approx(expected, rel=1e-3, abs=1e-9)
    for kind in ("divergence_to_reference", "divergence_to_target"):
        assert report[kind].keys() == {"reverse_kl", "forward_kl", "js", "tv", "hellinger", "pearson_chi2"}
        for measured in report[kind].values():
            assert (measured["value"] is None) == bool(measured["reason"])


def test_what_evaluate_says_of_the_policy_is_true_of_its_folder(whole):
    """KL and perplexity, computed again from the saved models by plain transformers."""
    path, folder = whole
    report = json.loads((folder / "evaluate" / "metrics.json").read_text())
    raw = yaml.safe_load(Path(path).read_text())
    tok = AutoTokenizer.from_pretrained(folder / "policy" / "model")
    for name, where in (("sft", "sft"), ("policy", "policy")):
        lm = AutoModelForCausalLM.from_pretrained(folder / where / "model").eval()
        nats = tokens = 0
        for row in jsonl(Path(raw["data"]["sft_eval"])):
            prompt = tok(row["prompt"])["input_ids"]
            text = [*tok(row["completion"])["input_ids"], tok.eos_token_id]
            with torch.no_grad():
                log_p = lm(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            nats -= float(log_p.gather(1, torch.tensor(text)[:, None]).sum())
            tokens += len(text)
        assert report[name]["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)
    pi, a = (AutoModelForCausalLM.from_pretrained(folder / where / "model").eval() for where in ("policy", "sft"))
    prompts = [tok(row["prompt"])["input_ids"] for row in jsonl(Path(raw["data"]["prompts_eval"]))]
    drawn, *_ = sample(pi, load_tokenizer(str(folder / "policy" / "model")), prompts, 4, uniforms(1, 0, 32, 6))
    kls, log_ratios = [], []
    for prompt, text, mask in zip(
        [p for p in prompts for _ in range(4)], drawn.completion_ids, drawn.mask, strict=True
    ):
        text = text[mask.bool()]
        with torch.no_grad():
            logits = (lm(torch.tensor([[*prompt, *text.tolist()]])).logits[0, len(prompt) - 1 : -1] for lm in (pi, a))
            log_pi, log_a = (x.log_softmax(-1) for x in logits)
        kls.append(float((log_pi.exp() * (log_pi - log_a)).sum()))
        log_ratios.append(float((log_pi - log_a).gather(1, text[:, None]).sum()))
    assert report["policy"]["kl_reference"] == pytest.approx(np.mean(kls), abs=1e-4)
    error = np.reshape(kls, (8, 4)).mean(1).std(ddof=1) / math.sqrt(8)
    assert report["policy"]["kl_reference_se"] == pytest.approx(error, rel=1e-2)
    assert report["divergence_to_reference"]["reverse_kl"]["value"] == pytest.approx(np.mean(log_ratios), abs=1e-3)


def test_both_models_write_with_the_same_noise(config, start):
    """So a policy that has not moved writes what the reference writes."""
    words = ("stages=[policy, evaluate]", f"policy.model={start}", "policy.max_steps=1", "policy.learning_rate=1e-30")
    folder = run(config(scorers={"reward": {"name": "pattern", "pattern": PATTERN}}), *words).path
    table = pd.read_parquet(folder / "evaluate" / "samples.parquet")
    assert table["sft"].tolist() == table["policy"].tolist()
    assert table["sft"].nunique() > 8


@pytest.mark.slow
def test_the_console_script_makes_the_same_run(config, whole):
    path = config(name="whole")
    script = Path(sys.executable).with_name("rlhf-fdiv")
    done = subprocess.run(
        [script, "run", path], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "report.md" in done.stdout
    assert "Traceback" not in done.stderr
    made = Path(path).parent / "runs" / "whole"
    mine, theirs = (json.loads((f / "evaluate" / "metrics.json").read_text()) for f in (made, whole[1]))
    assert mine["policy"]["objective"] == pytest.approx(theirs["policy"]["objective"], abs=1e-4)
    again = subprocess.run([script, "run", path, "seed=1"], capture_output=True, text=True)
    assert again.returncode == 2
    assert "seed: 0 → 1" in again.stderr
    assert "Traceback" not in again.stderr


# -- 2. what is made is an ordinary model ------------------------------------------------------------------------------


def test_sft_and_policy_folders_load_with_transformers_alone(whole):
    _, folder = whole
    for stage in ("sft", "policy"):
        model = AutoModelForCausalLM.from_pretrained(folder / stage / "model")
        assert not [n for n, _ in model.named_parameters() if "lora" in n]
        assert AutoTokenizer.from_pretrained(folder / stage / "model").get_vocab().keys() == set(tiny.WORDS)
        (out,) = pipeline("text-generation", model=str(folder / stage / "model"))(
            "film : one review :", max_new_tokens=4, do_sample=False
        )
        assert out["generated_text"].startswith("film : one review :")
    assert away(weights(folder / "sft" / "model"), weights(folder / "policy" / "model")) > 1e-3


def test_a_stage_starts_from_what_another_run_made(whole, policy):
    out = policy(f"policy.model={whole[1] / 'policy' / 'model'}", "policy.max_steps=2")
    checked(out)


# -- 3. a second run ---------------------------------------------------------------------------------------------------


def test_a_second_run_skips_every_finished_stage_and_changes_no_file(whole, capsys):
    path, folder = whole
    before = tree(folder)
    run(path)
    after = tree(folder)
    written_again = {"resolved_config.yaml"}
    assert {k: v[0] for k, v in before.items()} == {k: v[0] for k, v in after.items()}
    assert {k for k in before if before[k] != after[k]} <= written_again
    said = capsys.readouterr().out
    assert [f"{stage}: finished before, skipped" in said for stage in ("sft", "reward", "policy", "evaluate")] == [
        True
    ] * 4


def test_a_changed_config_is_refused_and_names_every_key(whole):
    path, folder = whole
    before = tree(folder)
    (message,) = problems(run, path, "policy.learning_rate=1e-4", "divergence=js", "seed=3")
    for part in ("policy.learning_rate: 0.01 → 0.0001", "seed: 0 → 3", "divergence", "'js'", "name=", "resume="):
        assert part in message
    assert tree(folder) == before


@pytest.mark.slow
def test_resume_runs_again_from_that_stage_and_puts_the_old_one_aside(config):
    path = config()
    folder = run(path).path
    before = tree(folder)
    run(path, "resume=policy", "policy.learning_rate=2e-3")
    after = tree(folder)
    for name, made in before.items():
        if name.startswith(("policy/", "evaluate/")):
            stage, _, rest = name.partition("/")
            assert after[f"{stage}.before-1/{rest}"] == made
        elif name.startswith(("sft/", "reward/")):
            assert after[name] == made
    assert away(weights(folder / "policy" / "model"), weights(folder / "policy.before-1" / "model")) > 1e-4
    assert json.loads((folder / "evaluate" / "metrics.json").read_text()) != json.loads(
        (folder / "evaluate.before-1" / "metrics.json").read_text()
    )
    again = tree(folder)
    run(path, "policy.learning_rate=2e-3")
    assert {k: v[0] for k, v in tree(folder).items()} == {k: v[0] for k, v in again.items()}
    run(str(folder / "resolved_config.yaml"))  # what a resumed run was made with does not itself ask for a resume
    assert {k: v[0] for k, v in tree(folder).items()} == {k: v[0] for k, v in again.items()}


@pytest.mark.slow
def test_reuse_takes_sft_and_reward_from_another_run_and_refuses_another_one(whole, config):
    path, reused = config(), f"reuse={whole[1]}"
    before = tree(whole[1])
    folder = run(path, reused, "policy.learning_rate=5e-3", "name=other").path
    assert not (folder / "sft").exists()
    assert not (folder / "reward").exists()
    checked(folder / "policy", 4)
    assert (folder / "report.md").is_file()
    assert tree(whole[1]) == before
    (message,) = problems(run, path, reused, "name=third", "sft.learning_rate=3e-3")
    assert "sft.learning_rate: 0.01 → 0.003" in message
    (message,) = problems(run, path, f"reuse={whole[1].parent / 'none'}", "name=fourth")
    assert "not a finished stage" in message


# -- 4. every combination runs -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rloo_matches_a_tilted_target_under_every_divergence(policy, name, start):
    out = policy(f"divergence={name}", "policy.max_steps=2")
    checked(out)
    assert away(weights(out / "model"), weights(Path(start))) > 1e-4


@pytest.mark.slow
def test_a_warmup_below_1_is_a_share_of_the_steps(policy):
    runs = (
        policy("policy.max_steps=4", "policy.lr_scheduler_type=linear", f"policy.warmup_steps={x}", f"name=w{x}")
        for x in (0.3, 2, 1)
    )
    share, two, one = (weights(out / "model") for out in runs)
    assert away(share, two) == 0
    assert away(share, one) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "js", "tv", "pearson_chi2", "jeffreys"])
def test_regularise_runs_under_any_divergence(policy, name):
    out = policy(f"divergence={name}", "objective=regularise", "policy.max_steps=2")
    rows = checked(out)
    assert rows[1]["objective"] == pytest.approx(rows[1]["praise"] - 0.5 * rows[1]["kl_reference"], abs=1e-4)


@pytest.mark.parametrize("model", [FULL, LORA], ids=["full", "lora"])
def test_ppo(policy, model):
    out = policy(
        model, "divergence=reverse_kl", "objective=regularise", "estimator={name: ppo, num_epochs: 2, num_minibatches: 2}",
        "policy.max_steps=2",
    )  # fmt: skip
    rows = checked(out)
    assert all(0 <= row["clip_fraction"] <= 1 for row in rows)
    assert all(row["explained_variance"] <= 1 for row in rows)
    assert load_file(out / "value_head.safetensors")["weight"].abs().max() > 0


def test_grpo_with_two_epochs(policy):
    rows = checked(policy("estimator={name: grpo, num_epochs: 2}", "policy.max_steps=2"))
    assert all("clip_fraction" in row for row in rows)


def test_weight_decay_takes_its_share_of_each_weight(policy, start):
    args = (FULL, "model.dtype=float64", "policy.max_steps=1", "policy.learning_rate=.01")
    one, none = (weights(policy(*args, f"name=d{d}", f"policy.weight_decay={d}") / "model") for d in (0.1, 0))
    for name, w in weights(Path(start)).items():
        torch.testing.assert_close(none[name] - one[name], 0.01 * 0.1 * w.double(), rtol=0, atol=1e-12)


def test_the_fused_adamw_is_adamw(policy):
    args = (FULL, "model.dtype=float64", "policy.max_steps=2", "policy.weight_decay=.1", "policy.learning_rate=.01")
    of = {optim: weights(policy(*args, f"name={optim}", f"policy.optim={optim}") / "model") for optim in
          ("adamw_torch", "adamw_torch_fused", "sgd")}  # fmt: skip
    assert away(of["adamw_torch"], of["adamw_torch_fused"]) < 1e-12
    assert away(of["adamw_torch"], of["sgd"]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
def test_rloo_with_two_epochs(policy, divergence):
    """A first epoch is what one epoch is; a second moves on from there, in micro-batches as in one."""
    args = (FULL, f"divergence={divergence}", "policy.max_steps=1", "policy.optim=sgd", "policy.learning_rate=.5")
    of = {
        name: policy(*args, f"name={name}", f"estimator={{name: rloo, num_epochs: {epochs}}}", *more)
        for name, epochs, *more in (("one", 1), ("two", 2), ("halves", 2, "policy.per_device_train_batch_size=16"))
    }
    assert away(weights(of["one"] / "model"), weights(of["two"] / "model")) > 1e-4
    assert away(weights(of["halves"] / "model"), weights(of["two"] / "model")) < 1e-6
    checked(
        policy("name=more", "estimator={name: rloo, num_epochs: 3}", f"divergence={divergence}", "policy.max_steps=2")
    )


def test_reinforce(policy):
    checked(policy("estimator=reinforce", "divergence=js", "policy.max_steps=2"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "js", "alpha", "tv", "hellinger", "neyman_chi2", "skew_js"])
def test_a_pointwise_target_with_atoms_of_zero(policy, name):
    """log Z is −inf for a prompt without one good text so far: declared, not nan."""
    rows = checked(
        policy("target={name: pointwise, scorer: praise}", f"divergence={name}", "policy.max_steps=2"),
        loose=("log_z", "objective"),
    )
    assert all(0 < row["out_of_support"] < 1 for row in rows)
    assert all(row["out_of_support"] == pytest.approx(1 - row["praise"], abs=1e-6) for row in rows)
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_moments_are_reached_and_reported(policy):
    goal = {"praise": 0.6, "words": 1.0}
    out = policy(
        f"target={{name: moments, moments: {json.dumps(goal)}, num_prompts: 12, num_generations: 16}}",
        "divergence=forward_kl", "policy.max_steps=2",
    )  # fmt: skip
    checked(out)
    solved = json.loads((out / "target.json").read_text())
    assert solved["reached"] == pytest.approx(goal, abs=1e-6)
    assert solved["lambdas"].keys() == goal.keys()
    assert all(abs(v) > 1e-3 for v in solved["lambdas"].values())
    assert solved["reference"]["praise"] != pytest.approx(0.6, abs=0.02)
    assert solved["residual"] <= 1e-6
    assert 0 < solved["ess"] <= solved["samples"] == 12 * 16


def test_moments_out_of_reach_are_told_with_the_reachable_range(policy):
    message = "\n".join(
        problems(policy, "target={name: moments, moments: {praise: 1.5}, num_prompts: 12, num_generations: 8}")
    )
    assert "praise = 1.5" in message
    assert "reachable range" in message


@pytest.mark.slow
def test_a_product_of_tilted_and_moments_and_a_floored_constraint(policy):
    product = (
        "{name: product, of: [{name: tilted, reward: words, beta: 2}, "
        "{name: moments, moments: {praise: .5}, num_prompts: 12, num_generations: 16}, "
        "{name: pointwise, scorer: praise, floor: .1}]}"
    )
    out = policy(f"target={product}", "policy.max_steps=2")
    rows = checked(out)
    assert {"praise", "words"} <= rows[0].keys()
    assert json.loads((out / "target.json").read_text())["reached"]["praise"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["cached", "generate"])
def test_model_kinds_and_engines(policy, model, dtype, engine, start):
    out = policy(model, f"model.dtype={dtype}", f"policy.engine={engine}", "policy.max_steps=2")
    checked(out, loose=("kl_reference",))
    (saved,) = {str(w.dtype).removeprefix("torch.") for w in weights(out / "model").values()}
    assert saved == dtype
    assert (out / "adapter").is_dir() == (model == LORA)
    assert away(weights(out / "model"), weights(Path(start))) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("model", [FULL, LORA], ids=["full", "lora"])
def test_logits_by_chunks_train_the_same_policy(policy, model):
    runs = [policy(model, f"name=by{n}", f"policy.logprob_chunk={n}", "policy.max_steps=3") for n in (0, 5)]
    plain, chunked = (jsonl(out / "metrics.jsonl") for out in runs)
    for a, b in zip(plain, chunked, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4, abs=1e-5)
        assert b["rollout_mismatch"] < 1e-5
    assert away(*(weights(out / "model") for out in runs)) < 1e-4


@pytest.mark.slow
def test_evaluate_reads_the_lambdas_that_the_policy_stage_solved(policy):
    overrides = (
        "stages=[policy, evaluate]",
        "target={name: moments, moments: {praise: .6}, num_prompts: 12, num_generations: 16}",
        "divergence=forward_kl",
    )
    out = policy(*overrides)
    report = json.loads((out.parent / "evaluate" / "metrics.json").read_text())
    lambdas = json.loads((out / "target.json").read_text())["lambdas"]
    potential = lambdas["praise"] * report["policy"]["praise"]
    assert report["policy"]["objective"] == pytest.approx(potential - report["policy"]["kl_reference"], abs=1e-5)


def evaluated(out):
    report = json.loads((out.parent / "evaluate" / "metrics.json").read_text())
    assert (out.parent / "report.md").read_text().count("\n## ") == 6
    return report


def test_evaluate_of_a_target_with_atoms_of_zero(policy):
    """E[log b] is −inf as soon as one text fails: null in the JSON, and all the rest is there."""
    report = evaluated(
        policy(
            "stages=[policy, evaluate]",
            "target={name: pointwise, scorer: praise}",
            "divergence=js",
            "policy.max_steps=2",
        )
    )
    assert report["policy"]["objective"] is None
    assert isinstance(report["policy"]["praise"], float)
    assert isinstance(report["paired"]["praise_gain_se"], float)
    assert isinstance(report["policy"]["kl_reference"], float)


@pytest.mark.slow
@pytest.mark.parametrize(
    "few",
    ["evaluate.num_prompts=1", "evaluate.num_generations=1"],
)
def test_evaluate_of_hardly_anything_still_writes_its_report(policy, few):
    report = evaluated(policy("stages=[policy, evaluate]", "policy.max_steps=1", "policy.learning_rate=.1", few))
    assert isinstance(report["policy"]["kl_reference"], float)
    if few == "evaluate.num_prompts=1":
        assert report["paired"]["praise_gain_se"] is None, "one prompt has no standard error"


@pytest.mark.slow
def test_one_text_alone_cannot_be_measured_and_this_is_told(policy):
    """Not by a traceback from the estimator."""
    (message,) = problems(policy, "stages=[policy, evaluate]", "evaluate.num_prompts=1", "evaluate.num_generations=1")
    assert "evaluate" in message
    (message,) = problems(policy, "policy.num_prompts=1", "policy.num_generations=1", "estimator=reinforce", "name=one")
    assert "policy.num_generations" in message


@pytest.mark.slow
def test_prompts_without_references_and_no_held_out_text_are_fine(policy, tmp_path):
    rows = write_rows(tmp_path / "plain.jsonl", [{"prompt": f"film : {t} review :"} for t in FILMS])
    report = evaluated(
        policy("stages=[policy, evaluate]", "policy.max_steps=2", f"data.prompts_eval={rows}", "data.sft_eval=null")
    )
    assert not {"perplexity", "bleu", "rouge_l"} & report["policy"].keys()
    assert isinstance(report["policy"]["objective"], float)


# -- 5. sft and reward -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 2])
def test_sft_with_forward_kl_is_plain_trl(config, start, data, batches):
    """The same weights as SFTTrainer's own cross-entropy, with arguments written out here."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    made = run(config(), "stages=[sft]", "seed=5", f"sft.gradient_accumulation_steps={batches}").path / "sft" / "model"
    plain = SFTConfig(
        output_dir=str(made.parent / "plain"), seed=5, max_steps=6, learning_rate=1e-2, lr_scheduler_type="linear",
        warmup_steps=0.1, per_device_train_batch_size=8, gradient_accumulation_steps=batches, max_length=64,
        completion_only_loss=True, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list(jsonl(Path(data["sft_train"])))
    lm = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    trainer = SFTTrainer(lm, plain, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(start))
    trainer.train()
    trainer.save_model(str(made.parent / "plain"))
    assert away(weights(made), weights(Path(start))) > 1e-2, "it did train"
    assert away(weights(made), weights(made.parent / "plain")) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["{name: alpha, alpha: 0.3}", "hellinger", "tv", "js"])
def test_sft_under_other_divergences(config, name, start):
    out = run(config(), "stages=[sft]", f"sft.divergence={name}", "sft.max_steps=20").path / "sft"
    losses = [row["loss"] for row in jsonl(out / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert away(weights(out / "model"), weights(Path(start))) > 1e-2


@pytest.mark.slow
def test_sft_that_was_stopped_goes_on_to_the_same_weights(config, monkeypatch):
    from rlhf_fdiv.stages import sft

    path = config()
    args = ("stages=[sft]", "sft.save_steps=2")
    unbroken = run(path, *args, "name=unbroken").path / "sft"

    def step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(sft.MetricsCallback, "on_step_end", step_end)
    with pytest.raises(KeyboardInterrupt):
        run(path, *args, "name=broken")
    monkeypatch.undo()
    broken = run(path, *args, "name=broken").path / "sft"
    assert same(weights(broken / "model"), weights(unbroken / "model"))
    assert [row["step"] for row in jsonl(broken / "metrics.jsonl")] == [
        row["step"] for row in jsonl(unbroken / "metrics.jsonl")
    ]


def separable(folder):
    """Pairs whose better text always says `good`: any reward model must learn this."""
    rows = [
        {"prompt": f"film : {title} review :", "chosen": f" {a} is good {b}", "rejected": f" {a} is bad {b}"}
        for title in FILMS[:6]
        for a, b in (("plot", "very"), ("cast", "and"), ("the plot", "film"), ("a cast", "three"))
    ]
    held = [
        {
            "prompt": f"film : {t} review :",
            "chosen": " a film is good one",
            "rejected": " a film is bad one",
            "margin": 2,
        }
        for t in FILMS[6:]
    ]
    return {
        "preferences_train": write_rows(folder / "train.jsonl", rows),
        "preferences_eval": write_rows(folder / "eval.jsonl", held),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("words", "share"), [((), 0.8), (("reward.label_smoothing=.1",), 0.74)], ids=["", "smoothed"])
@pytest.mark.parametrize("method", [
    ("reward.l2=.01",),
    ("reward.method=finetune", "reward.max_steps=60", "reward.learning_rate=5e-3",
     "reward.training_args={lr_scheduler_type: constant}"),
], ids=["head", "finetune"])  # fmt: skip
def test_a_reward_model_is_as_sure_as_the_raters_were(config, data, tmp_path, method, words, share):
    """One pair, which four of five prefer: σ of the margin that fits is .8."""
    rows = [{"prompt": f"film : {film} review :", "chosen": " plot is good", "rejected": " plot is bad", "preference": 0.8}
            for film in FILMS]  # fmt: skip
    files = {k: v for k, v in data.items() if k not in ("gold", "preferences_eval")}
    path = config(data=files | {"preferences_train": write_rows(tmp_path / "soft.jsonl", rows)})
    out = run(path, "stages=[reward]", *method, *words).path / "reward"
    model = load_reward_model(str(out / "model"), torch.device("cpu"))
    chosen, rejected = (
        torch.tensor(model.score([r["prompt"] for r in rows], [r[side] for r in rows], 8))
        for side in ("chosen", "rejected")
    )
    assert float((chosen - rejected).sigmoid().mean()) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("l2", [0.5, 20.0])
def test_the_heads_weights_are_at_the_minimum_of_loss_and_penalty(l2):
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(40, 5, generator=generator).double(), torch.rand(40, generator=generator).double()
    f = divergences.get("forward_kl")

    def slope(w):
        w = w.double().requires_grad_()
        loss = preference_divergence(f, x @ w, c).mean() + l2 / (2 * len(x)) * (w @ w)
        return torch.autograd.grad(loss, w)[0]

    w = fit_head(f, x, c, l2)
    assert slope(w).norm() <= 1e-4 * slope(torch.zeros(5)).norm()


@pytest.mark.parametrize("name", ["forward_kl", "js", "hellinger", "tv"])
def test_a_reward_head_learns_a_separable_preference(config, data, tmp_path, name):
    files = separable(tmp_path)
    path = config(data={k: v for k, v in data.items() if k != "gold"} | files)
    out = run(path, "stages=[reward]", f"reward.divergence={name}", "reward.l2=0.1").path / "reward"
    report = json.loads((out / "accuracy.json").read_text())
    assert report["accuracy"] > 0.9
    assert report["accuracy_more_than_1_apart"] > 0.9
    assert report["pairs"] == 6


def test_a_fine_tuned_reward_model_is_an_ordinary_classifier(config, data, tmp_path):
    files = separable(tmp_path)
    path = config(data={k: v for k, v in data.items() if k != "gold"} | files)
    settings = ("reward.method=finetune", "reward.max_steps=30", "reward.learning_rate=5e-3")
    out = run(path, "stages=[reward]", *settings).path / "reward"
    model = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    assert model.config.num_labels == 1
    assert json.loads((out / "accuracy.json").read_text())["accuracy"] > 0.9
    tok = AutoTokenizer.from_pretrained(out / "model", padding_side="right")
    texts = ["film : one review : the plot is good<eos>", "film : one review : the plot is bad<eos>"]
    with torch.no_grad():
        better, worse = model(**tok(texts, return_tensors="pt", padding=True)).logits[:, 0].tolist()
    assert better > worse


def test_a_run_with_a_fine_tuned_reward_model_from_elsewhere(config, start, tmp_path):
    """`scorers.reward.path`: a classifier that no stage of ours made."""
    theirs = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1)
    theirs.config.pad_token_id = 0
    theirs.save_pretrained(tmp_path / "theirs")
    tiny.tokenizer().save_pretrained(tmp_path / "theirs")
    out = run(config(), "stages=[policy]", f"policy.model={start}", f"scorers.reward.path={tmp_path / 'theirs'}").path
    checked(out / "policy", 4)


def test_a_divergence_that_hard_labels_make_infinite_is_refused(config):
    message = "\n".join(problems(run, config(), "stages=[reward]", "reward.divergence=reverse_kl"))
    assert "reward.divergence" in message
    assert "label_smoothing" in message


# -- 6. resume ---------------------------------------------------------------------------------------------------------

RESUMES = {
    "rloo-lora": [LORA],
    "rloo-full": [FULL],
    "ppo": [FULL, "objective=regularise", "estimator={name: ppo, num_epochs: 2, num_minibatches: 2}"],
    "generate": [LORA, "policy.engine=generate"],
    "schedule": [LORA, "policy.lr_scheduler_type=cosine", "policy.warmup_steps=1", "policy.weight_decay=.1"],
    "warm-start": [LORA, "divergence=js", "policy.warm_start_generations=4"],
    "moments": [LORA, "divergence=forward_kl", "target={name: moments, moments: {praise: .6}, num_prompts: 12}"],
    "pointwise": [LORA, "divergence=tv", "target={name: pointwise, scorer: praise}"],
    "bfloat16": [FULL, "model.dtype=bfloat16"],
    "replay": [LORA, "policy.replay_steps=2", "estimator={name: rloo, num_epochs: 2}"],
}  # fmt: skip


class Stopped(BaseException):
    """As a kill: nothing in the library may catch it."""


def stop_after(monkeypatch, step):
    """The process ends right after the update of `step`, before that step is logged or saved."""
    logged = policy_stage.Log.step

    def stop(self, now, *args):
        if now == step:
            raise Stopped
        return logged(self, now, *args)

    monkeypatch.setattr(policy_stage.Log, "step", stop)


def assert_same_outcome(broken, unbroken):
    assert without_time(jsonl(broken / "metrics.jsonl")) == without_time(jsonl(unbroken / "metrics.jsonl"))
    assert same(weights(broken / "model"), weights(unbroken / "model"))
    for folder in ("adapter", "checkpoint-4"):
        for file in sorted((unbroken / folder).glob("*.safetensors")):
            assert same(load_file(broken / folder / file.name), load_file(file)), file
    states = [json.loads((o / "checkpoint-4" / "policy_state.json").read_text()) for o in (broken, unbroken)]
    assert states[0] == states[1]
    assert len(states[0]["log_partition"]["kept"]) >= 12
    pd.testing.assert_frame_equal(completions(broken), completions(unbroken))


@pytest.fixture(scope="module")
def unbroken(start, data, tmp_path_factory):
    """unbroken(policy, case): the folder of a run that nothing stopped, made once a case."""
    made = {}

    def unbroken(policy, case):
        if case not in made:
            made[case] = policy(*RESUMES[case], "name=unbroken", f"output_dir={tmp_path_factory.mktemp(case)}")
        return made[case]

    return unbroken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "step"),
    [(case, 3) for case in RESUMES]
    + [(case, 1) for case in ("rloo-lora", "ppo", "warm-start", "moments", "pointwise")],
)
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(policy, unbroken, monkeypatch, case, step):
    """Stopped before the first checkpoint, and after it."""
    goal = unbroken(policy, case)
    stop_after(monkeypatch, step)
    with pytest.raises(Stopped):
        policy(*RESUMES[case], "name=broken")
    monkeypatch.undo()
    assert_same_outcome(policy(*RESUMES[case], "name=broken"), goal)


@pytest.mark.slow
def test_a_run_that_was_stopped_after_its_last_checkpoint_still_writes_its_model(policy, unbroken, monkeypatch):
    goal = unbroken(policy, "rloo-lora")
    monkeypatch.setattr("rlhf_fdiv.stages.training.save_policy", lambda *args: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        policy(*RESUMES["rloo-lora"], "name=broken")
    monkeypatch.undo()
    assert_same_outcome(policy(*RESUMES["rloo-lora"], "name=broken"), goal)


@pytest.mark.slow
def test_a_run_that_was_stopped_while_it_saved_goes_on_from_the_checkpoint_before(policy, monkeypatch):
    unbroken = policy("policy.save_steps=1", "name=unbroken")

    def replace(a, b):
        if str(b).endswith("checkpoint-3"):
            raise Stopped
        return os.rename(a, b)

    monkeypatch.setattr("rlhf_fdiv.stages.saving.os.replace", replace)
    with pytest.raises(Stopped):
        policy("policy.save_steps=1", "name=broken")
    monkeypatch.undo()
    broken = policy("policy.save_steps=1", "name=broken")
    assert_same_outcome(broken, unbroken)
    assert sorted(p.name for p in broken.glob("*checkpoint*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.slow
def test_a_resumed_run_shows_each_step_once_in_tensorboard(policy, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = ("report_to=tensorboard", "policy.max_steps=4")
    stop_after(monkeypatch, 4)
    with pytest.raises(Stopped):
        policy(*args)
    monkeypatch.undo()
    out = policy(*args)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("objective")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_run_stopped_before_its_first_checkpoint_shows_each_step_once_in_tensorboard(policy, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stop_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        policy("report_to=tensorboard")
    monkeypatch.undo()
    events = EventAccumulator(str(policy("report_to=tensorboard") / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("objective")] == [1, 2, 3, 4]


def test_a_checkpoint_holds_what_is_trained_and_nothing_frozen(policy):
    lora = policy("name=lora", "objective=regularise", "estimator={name: ppo}", LORA)
    (file,) = (lora / "checkpoint-4").glob("*.safetensors")
    names = load_file(file)
    assert {n for n in names if "lora_" not in n} == {"value_head.weight", "value_head.bias"}
    adapter = {n.replace("lm.", "", 1).replace(".default", "") for n in names if "lora_" in n}
    assert adapter == load_file(lora / "adapter" / "adapter_model.safetensors").keys()
    full = policy("name=full", FULL)
    (file,) = (full / "checkpoint-4").glob("*.safetensors")
    assert {n.removeprefix("lm.") for n in load_file(file)} == weights(full / "model").keys()
    assert sorted(p.name for p in full.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


# -- 7. nan in a reward or a loss --------------------------------------------------------------------------------------

BROKEN = """
    calls = 0

    def score(prompts, completions, **columns):
        global calls
        calls += 1
        values = [float(len(c)) for c in completions]
        if calls == {at}:
            values[1] = {value}
        return values
"""


def assert_stopped(out, step, rows=16):
    """The batch is there to read, the checkpoint of step 2 is whole, and no model was written."""
    batch = pd.read_parquet(out / f"bad_batch-{step}.parquet")
    assert len(batch) == rows
    assert batch["prompts"].isin([f"film : {title} review :" for title in FILMS]).all()
    assert batch["completions"].map(type).eq(str).all()
    assert (out / "checkpoint-2" / "policy_state.json").is_file()
    assert not (out / "model").exists()
    assert not (out / "finished.json").exists()
    assert [row["step"] for row in jsonl(out / "metrics.jsonl")] == [*range(1, step)]


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "-float('inf')"])
def test_a_reward_that_is_not_finite_stops_the_step_and_keeps_the_batch(policy, tmp_path, monkeypatch, value):
    name = module(tmp_path, monkeypatch, BROKEN.format(at=3, value=value), "their_nan")
    args = (
        f"scorers.theirs={{name: function, path: '{name}:score'}}",
        "target={name: tilted, reward: theirs, beta: 9}",
    )
    message = "\n".join(problems(policy, *args))
    assert "'theirs'" in message
    assert "completion 1" in message
    out = Path(policy.path).parent / "runs" / "policy" / "policy"
    assert f"{out / 'bad_batch-3.parquet'}" in message
    assert_stopped(out, 3)
    checked(policy(*args), 4)  # the function is mended: the run goes on from its checkpoint


@pytest.mark.parametrize("value", ["'x'", "1 / 0", "[1.0]"])
def test_a_reward_function_that_fails_is_named_and_its_batch_kept(policy, tmp_path, monkeypatch, value):
    name = module(tmp_path, monkeypatch, BROKEN.format(at=3, value=value), "their_error")
    args = (
        f"scorers.theirs={{name: function, path: '{name}:score'}}",
        "target={name: tilted, reward: theirs, beta: 9}",
    )
    message = "\n".join(problems(policy, *args))
    assert "theirs" in message
    assert_stopped(Path(policy.path).parent / "runs" / "policy" / "policy", 3)


@pytest.mark.parametrize("estimator", ["rloo", "ppo"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_it_reaches_a_weight(policy, monkeypatch, value, estimator):
    kept, calls = {}, []
    loss, update = policy_update.policy_loss, policy_stage.update

    def broken(*args):
        calls.append(1)
        return loss(*args) * (value if kept.get("step") == 3 else 1)

    def watched(training, *args):
        kept["step"], policy = kept.get("step", 0) + 1, training.policy
        kept["policy"], kept["before"] = policy, {k: v.clone() for k, v in policy.state_dict().items()}
        return update(training, *args)

    monkeypatch.setattr(policy_update, "policy_loss", broken)
    monkeypatch.setattr(policy_stage, "update", watched)
    message = "\n".join(problems(policy, f"estimator={estimator}"))
    assert "step 3" in message
    assert "loss" in message
    assert same(kept["policy"].state_dict(), kept["before"])
    assert_stopped(Path(policy.path).parent / "runs" / "policy" / "policy", 3)


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_a_weight(policy, monkeypatch):
    kept, update = {}, policy_stage.update

    def watched(training, *args):
        kept["step"], policy = kept.get("step", 0) + 1, training.policy
        if kept["step"] == 3:
            next(p for p in policy.parameters() if p.requires_grad).register_hook(lambda g: g * math.nan)
        kept["policy"], kept["before"] = policy, {k: v.clone() for k, v in policy.state_dict().items()}
        return update(training, *args)

    monkeypatch.setattr(policy_stage, "update", watched)
    message = "\n".join(problems(policy))
    assert "step 3: the gradient norm is nan" in message
    assert same(kept["policy"].state_dict(), kept["before"])
    assert_stopped(Path(policy.path).parent / "runs" / "policy" / "policy", 3)


# -- user functions and the columns of the data ------------------------------------------------------------------------

COLUMNS = """
    def overlap(prompts, completions, references, **columns):
        assert len(prompts) == len(completions) == len(references)
        return [float(any(set(c.split()) & set(r.split()) for r in rs)) for c, rs in zip(completions, references)]

    def names(prompts, completions, names=None, **columns):
        return [float(n == "x") for n in names]

    def length(prompts, completions, **columns):
        return [float(len(c.split())) for c in completions]
"""


@pytest.mark.slow
def test_a_users_function_reads_the_columns_of_the_prompts_in_training_and_evaluation(policy, tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, COLUMNS, "their_columns")
    out = policy(
        f"scorers.theirs={{name: function, path: '{name}:overlap'}}",
        "target={name: tilted, reward: theirs, beta: 1}",
        "stages=[policy, evaluate]",
    )
    report = json.loads((out.parent / "evaluate" / "metrics.json").read_text())
    assert 0 <= report["policy"]["theirs"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("function", ["names", "length"])
def test_columns_of_any_name_reach_a_users_function_and_never_replace_the_completions(
    policy, tmp_path, monkeypatch, function
):
    name = module(tmp_path, monkeypatch, COLUMNS, "their_names")
    rows = [
        {"prompt": f"film : {t} review :", "names": "x", "completions": "good " * 40, "step": 7, "theirs": "kept"}
        for t in FILMS
    ]
    out = policy(
        f"scorers.theirs={{name: function, path: '{name}:{function}'}}",
        f"data.prompts_train={write_rows(tmp_path / 'named.jsonl', rows)}",
        "target={name: tilted, reward: theirs, beta: 1}",
        "policy.max_steps=2",
    )
    for row in checked(out):
        assert row["theirs"] <= 6
        assert function == "length" or row["theirs"] == 1
    table = pd.read_parquet(out / "completions")
    found = {name: {*table[name]} for name in ("step", "data.step", "data.theirs")}
    assert found == {"step": {1, 2}, "data.step": {7}, "data.theirs": {"kept"}}
    assert table["theirs"].dtype == float


# -- 8. bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may load weights, nor leave a run folder half begun."""

    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    for cls in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(cls, "from_pretrained", fail)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", fail)


def test_everything_wrong_with_the_data_is_told_at_once(config, data, tmp_path, no_model):
    files = {k: v for k, v in data.items() if k != "gold"}
    good = jsonl(Path(data["sft_train"]))
    (tmp_path / "empty.jsonl").write_text("")
    long = [{"prompt": "film : one review :"}, {"prompt": "very " * 70}]
    files |= {
        "sft_train": write_rows(tmp_path / "no_field.jsonl", [*good[:2], {"prompt": "film", "completoin": "good"}]),
        "preferences_train": str(tmp_path / "empty.jsonl"),
        "prompts_train": write_rows(tmp_path / "long.jsonl", long),
        "prompts_eval": str(tmp_path / "absent.jsonl"),
    }
    scorers = {
        "reward": {"name": "reward_model"},
        "gold": {"name": "ngram_ridge", "data": str(tmp_path / "no_gold.jsonl")},
        "theirs": {"name": "function", "path": "no_such_module_of_mine:score"},
    }
    path = config(data=files, scorers=scorers)
    told = problems(run, path)
    for words in (
        ("no_field.jsonl, row 3", "no field 'completion'", "did you mean 'completoin'"),
        ("empty.jsonl", "no rows"),
        ("long.jsonl, row 2", "70 tokens", "room for 58"),
        ("absent.jsonl", "no such file"),
        ("no_gold.jsonl", "no such file"),
        ("no_such_module_of_mine:score",),
    ):
        assert any(all(word in line for word in words) for line in told), (words, told)
    assert len(told) == 6
    assert not (tmp_path / "runs").exists()


def test_bad_input_through_the_console_entry_point(config, tmp_path, no_model, monkeypatch, capsys):
    from rlhf_fdiv import cli

    (tmp_path / "empty.jsonl").write_text("\n")
    path = config()
    monkeypatch.setattr(sys, "argv", ["rlhf-fdiv", "run", path, f"data.sft_train={tmp_path / 'empty.jsonl'}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "empty.jsonl: no rows" in said


@pytest.mark.parametrize("key", ["model.name_or_path", "policy.model"])
def test_a_tokenizer_without_eos_is_told_before_any_model_loads(config, tmp_path, no_model, key):
    folder = model_folder_of_config_alone(tmp_path / "no_eos", pad_token="<pad>")
    message = "\n".join(problems(run, config(), f"{key}={folder}"))
    assert "no EOS token" in message
    assert folder in message


@pytest.mark.parametrize("key", ["model.name_or_path", "policy.model"])
def test_an_encoder_decoder_is_told_before_any_model_loads(config, tmp_path, no_model, key):
    T5Config(vocab_size=24, d_model=8).save_pretrained(tmp_path / "t5")
    tiny.tokenizer().save_pretrained(tmp_path / "t5")
    message = "\n".join(problems(run, config(), f"{key}={tmp_path / 't5'}"))
    assert "encoder–decoder" in message
    assert str(tmp_path / "t5") in message


def test_the_model_of_sft_is_checked_also_where_the_policy_starts_from_another(config, start, tmp_path, no_model):
    folder = model_folder_of_config_alone(tmp_path / "no_eos", pad_token="<pad>")
    message = "\n".join(problems(run, config(), f"model.name_or_path={folder}", f"policy.model={start}"))
    assert "no EOS token" in message
    assert not (tmp_path / "runs").exists(), "told before the run begins"


def model_folder_of_config_alone(folder, **special):
    made = model_folder(folder, **special)
    (folder / "model.safetensors").unlink()
    return made


def test_a_divergence_that_the_target_forbids_is_told_before_any_file_is_read(config, no_model):
    told = problems(run, config(target={"name": "pointwise", "scorer": "praise"}))
    assert len(told) == 1
    assert "divergence: reverse_kl is infinite where the target is zero" in told[0]
    told = problems(
        run, config(objective="regularise", target={"name": "pointwise", "scorer": "praise"}), "divergence=js"
    )
    assert "regularise needs a finite reward" in told[0]


def test_mistakes_in_several_sections_are_told_at_once(config, no_model):
    told = problems(
        run, config(), "policy.learnig_rate=1", "sft.divergence=pearson_chi2", "model.dtype=float33", "divergence=jss",
        "evaluate.batch_size=none",
    )  # fmt: skip
    for words in (
        ("policy.learnig_rate", "did you mean 'learning_rate'"), ("model.dtype",), ("jss", "'js'"), ("evaluate.batch_size",),
    ):  # fmt: skip
        assert any(all(word in line for word in words) for line in told), (words, told)


def test_a_trainer_argument_that_trl_does_not_know_is_told_before_any_model_loads(config, no_model):
    (message,) = problems(run, config(), "sft.training_args={weight_deacy: .1}")
    assert "sft.training_args.weight_deacy" in message
    assert "did you mean 'weight_decay'" in message


@pytest.mark.parametrize(
    ("special", "told"), [(None, "gone"), ({"eos_token": "<eos>", "pad_token": "<pad>"}, "one label")]
)
def test_a_reward_model_is_looked_at_before_any_model_loads(config, start, tmp_path, no_model, special, told):
    path = tmp_path / "gone" if special is None else model_folder_of_config_alone(tmp_path / "labels", **special)
    scorers = {"reward": {"name": "reward_model", "path": str(path)}}
    message = "\n".join(problems(run, config(stages=["policy"], scorers=scorers), f"policy.model={start}"))
    assert told in message
    assert str(path) in message


def test_a_missing_reward_stage_is_told_before_any_model_loads(config, start, no_model):
    message = "\n".join(problems(run, config(), "stages=[policy]", f"policy.model={start}"))
    assert "reward stage" in message


@pytest.mark.slow
def test_a_scorer_that_the_target_does_not_use_need_not_be_there(config, start):
    """A stage can start from something made elsewhere: the run's own reward model is not asked for."""
    out = run(config(), "stages=[policy]", f"policy.model={start}", "target.reward=praise").path / "policy"
    checked(out, 4)


def test_a_completion_longer_than_the_context_is_told_before_any_model_loads(config, no_model):
    message = "\n".join(problems(run, config(), "policy.max_completion_length=64"))
    assert "prompts_train.jsonl, row 1" in message
    assert "room for 0" in message


def test_evaluate_without_a_policy_says_so(config, no_model):
    message = "\n".join(problems(run, config(), "stages=[evaluate]"))
    assert "policy stage is not finished" in message


# -- 9. learning -------------------------------------------------------------------------------------------------------

LEARN = (
    "policy.max_steps=40", "policy.num_prompts=6", "policy.num_generations=8", "policy.per_device_train_batch_size=48",
    "policy.learning_rate=1e-2", "policy.lr_scheduler_type=linear", "policy.save_steps=40", "stages=[policy, evaluate]",
    "evaluate.num_generations=64", "evaluate.perplexity_rows=0", "target={name: tilted, reward: praise, beta: .2}",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["match", "regularise"])
def test_training_climbs_towards_the_known_optimum_and_not_past_it(policy, objective):
    """max E[r] − β·KL is β·E_x[log Z(x)]: a policy gets most of the way there and cannot exceed it."""
    out = policy(*LEARN, f"objective={objective}")
    report = json.loads((out.parent / "evaluate" / "metrics.json").read_text())
    gain, error = report["paired"]["objective_gain"], report["paired"]["objective_gain_se"]
    assert gain > 5 * error
    best = 0.2 * report["log_z"]["mean"]
    assert report["policy"]["objective"] < best + 4 * error
    assert gain > 0.5 * (best - report["sft"]["objective"])


@pytest.mark.slow
def test_gdc_moves_the_moment_to_its_goal(policy):
    """Forward KL to the target whose moment is .8: what is sampled afterwards has it, nearly."""
    goal = "target={name: moments, moments: {praise: .8}, num_prompts: 12, num_generations: 64}"
    out = policy(*LEARN[:-1], goal, "divergence=forward_kl", "policy.max_steps=100", "evaluate.num_generations=100")
    report = json.loads((out.parent / "evaluate" / "metrics.json").read_text())
    before, after = (report[m]["praise"] for m in ("sft", "policy"))
    assert abs(before - 0.8) > 0.2
    assert abs(after - 0.8) < 0.05 + 3 * report["policy"]["praise_se"]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.slow
def test_lambda_that_follows_the_policy_finds_its_moment_from_a_wrong_start(policy, name):
    """λ = 0 asks for no change at all; only the ascent can take the policy to its goal."""
    goal = "target={name: moments, moments: {praise: .8}, lambdas: {praise: 0}, dual_learning_rate: .1}"
    out = policy(*LEARN[:-1], goal, f"divergence={name}", "policy.max_steps=120", "evaluate.num_generations=100")
    report = json.loads((out.parent / "evaluate" / "metrics.json").read_text())["policy"]
    assert abs(report["praise"] - 0.8) < 0.05 + 3 * report["praise_se"]
    assert jsonl(out / "metrics.jsonl")[-1]["lambda_praise"] > 0.5


# -- 10. two processes -------------------------------------------------------------------------------------------------


def test_a_second_process_runs_the_stage_that_resume_names_even_where_it_still_looks_finished(policy, monkeypatch):
    """The first process puts the old stage aside; the second may look before that, and would wait for no one."""
    policy("policy.max_steps=1")
    ran = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(policy_stage, "main", lambda config, folder, out: ran.append(out.name))
    policy("policy.max_steps=2", "resume=policy")
    assert ran == ["policy"]


@pytest.mark.slow
def test_two_processes_agree_that_resume_runs_a_finished_stage_again(policy):
    """The second must not see the finished stage before the first has put it aside."""
    out = policy("policy.max_steps=1")
    said = two_processes("-m", "rlhf_fdiv.stages.policy", policy.path, "policy.max_steps=2", "resume=policy")
    assert "hung" not in said
    assert (out.parent / "policy.before-1" / "finished.json").is_file(), said
    assert (out / "finished.json").is_file(), said
    checked(out)
