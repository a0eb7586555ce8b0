"""Every family of models through every stage, by what the command line calls; and what is refused."""

import json

import pytest
import tiny
import torch
from architectures import SIZES, tiny_model
from peft import PeftModel
from tiny import WORDS, raw_config, run, write_config
from transformers import AutoModelForCausalLM

every_family = pytest.mark.parametrize("architecture", SIZES)
SHORT = ["sft.max_steps=2", "policy.max_steps=2", "evaluate.num_prompts=4", "evaluate.num_generations=2"]
MORE = {
    "prefer": {"max_steps": 2, "num_pairs": 4, "max_completion_length": 6, "learning_rate": 1e-2},
    "distil": {"max_steps": 2, "num_prompts": 4, "max_completion_length": 6, "learning_rate": 1e-2},
}


def folder_of(architecture, folder, **ids):
    tiny_model(architecture, len(WORDS), **ids).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@every_family
def test_every_stage_runs(architecture, data, tmp_path):
    """…, and leaves a merged model and the adapter alone, which are one policy for transformers and peft."""
    start = folder_of(architecture, tmp_path / "start")
    raw = raw_config(start, data, tmp_path / "runs") | MORE
    path = write_config(tmp_path / "all.yaml", raw)
    first = run(path, *SHORT)
    again = [*SHORT, f"reuse={first.path}", f"scorers.reward.path={first.stage('reward')}/model"]
    pairs = run(path, *again, "name=pairs", "objective=prefer", "stages=[sft, prefer]")
    teacher = f"distil.teacher={first.stage('policy')}/model"
    taught = run(path, *again, "name=taught", "objective=distil", "stages=[sft, distil]", teacher)
    report = json.loads((first.stage("evaluate") / "metrics.json").read_text())
    assert report["policy"]["kl_reference"] > 0
    batch = tiny.tokenizer()(["film : one review :", "a very good film"], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)

    def logits(model):
        with torch.no_grad():
            return model.eval()(**batch).logits

    for out in (first.stage("policy"), pairs.stage("prefer"), taught.stage("distil")):
        base = AutoModelForCausalLM.from_pretrained(first.stage("sft") / "model")
        before, merged = logits(base), logits(AutoModelForCausalLM.from_pretrained(out / "model"))
        assert (merged - logits(PeftModel.from_pretrained(base, out / "adapter"))).abs().max() < 1e-5
        assert (merged - before).abs().max() > 1e-3, "it has been trained"
