"""What a stranger's model, checkpoint or config cannot do: run code."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from tiny import problems, run, write_config
from transformers import AutoModelForCausalLM

import rlhf_fdiv
from rlhf_fdiv.model_options import ModelOptions
from rlhf_fdiv.models import load_causal_lm
from rlhf_fdiv.stages.saving import no_code

ROOT = Path(__file__).parents[1]


class Bomb:
    """A pickle that leaves a file where it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_adapter_that_has_only_a_pickle_is_refused_and_not_opened(start, tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": start, "target_modules": ["q_proj"], "r": 2}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (message,) = problems(load_causal_lm, str(tmp_path / "adapter"), ModelOptions("x"))
    assert "no adapter_model.safetensors" in message
    assert not (tmp_path / "exploded").exists()


def test_a_model_that_has_only_a_pickle_is_refused_and_not_opened(start, tmp_path):
    AutoModelForCausalLM.from_pretrained(start).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (message,) = problems(load_causal_lm, str(tmp_path / "model"), ModelOptions("x"))
    assert "no weights in safetensors there" in message
    assert not (tmp_path / "exploded").exists()


@pytest.mark.slow
def test_a_checkpoint_whose_pickles_were_exchanged_is_named_and_they_are_not_opened(start, data, tmp_path):
    raw = tiny.raw_config(start, data, tmp_path) | {"stages": ["policy"], "report_to": "none"}
    raw["scorers"] = {"praise": {"name": "pattern", "pattern": tiny.PATTERN}}
    raw["target"]["reward"], raw["policy"]["model"] = "praise", start
    path = write_config(tmp_path / "a.yaml", raw)
    folder = run(path).stage("policy")
    (folder / "finished.json").unlink()
    for n in (2, 4):
        state = folder / f"checkpoint-{n}" / "policy_state.json"
        state.write_text(
            json.dumps({**json.loads(state.read_text()), "files": {}})
        )  # by one who knows of the checksums
        for file in ("optimizer.bin", "random_states_0.pkl"):
            with (state.parent / file).open("wb") as out:
                torch.save(Bomb(tmp_path / "exploded"), out)
    (message,) = problems(run, path)
    assert "none of its checkpoints can be read" in message
    assert not (tmp_path / "exploded").exists()


def test_deepspeeds_checkpoints_are_opened_without_their_code(tmp_path):
    engine = pytest.importorskip("deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine").TorchCheckpointEngine()
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "bomb.pt")
    with no_code(), pytest.raises(pickle.UnpicklingError):
        engine.load(str(tmp_path / "bomb.pt"))
    assert not (tmp_path / "exploded").exists()


def test_a_config_is_data(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path / 'exploded'}']\n")
    problems(run, str(path))
    assert not (tmp_path / "exploded").exists()


def test_the_source_opens_no_pickle_trusts_no_remote_code_and_evaluates_nothing():
    for path in Path(rlhf_fdiv.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bimport pickle\b|torch\.load\(|trust_remote_code|(?<![.\w])(eval|exec)\(", text), path


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written(start, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_test")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret_of_the_test")
    raw = tiny.raw_config(start, data, tmp_path) | {"stages": ["sft"]}
    folder = run(write_config(tmp_path / "a.yaml", raw)).path
    for file in (p for p in folder.rglob("*") if p.is_file()):
        assert b"secret_of_the_test" not in file.read_bytes(), file


@pytest.mark.slow
def test_no_pinned_version_has_a_known_vulnerability(tmp_path):
    """By pip-audit in a folder of its own. Skipped, with the reason, where the advisories of a pin could not be read."""
    install = ["pip", "install", "--quiet", "--target", str(tmp_path), "pip-audit"]
    audit = [
        "pip_audit",
        "--no-deps",
        "--disable-pip",
        "--progress-spinner=off",
        "--format=json",
        "-r",
        "constraints.txt",
    ]
    for command in (install, audit):
        made = subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )
        if made.returncode and not made.stdout:
            pytest.skip(f"{command[0]}: {made.stderr.strip().splitlines()[-1]}")
    pins = json.loads(made.stdout)["dependencies"]
    assert not [pin for pin in pins if pin.get("vulns")]
    if unread := [pin for pin in pins if "skip_reason" in pin]:
        pytest.skip(f"{len(unread)} of {len(pins)} pins were not audited: {unread[0]['skip_reason']}")
