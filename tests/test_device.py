"""What a GPU changes: run with `--device cuda` where there is one. Without the option the same tests run on the CPU."""

import pytest
import tiny
import torch
from toy import ARCHITECTURES, LENGTH, PROMPTS, TOKENIZER, P, tiny_lm, with_adapter

from rlhf_fdiv.models import Policy
from rlhf_fdiv.rollout import sample, uniforms
from rlhf_fdiv.stages import policy as stage
from rlhf_fdiv.stages.training import Training

K = 50


def drawn(lm, engine="cached"):
    return sample(lm, TOKENIZER, PROMPTS, K, uniforms(0, 1, P * K, LENGTH), engine)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_noise_decides_what_is_sampled_on_any_device(device, architecture, lora):
    lm = with_adapter(tiny_lm(architecture)) if lora else tiny_lm(architecture)
    expected, log_probs, entropy = drawn(lm)
    sequences, ours, spread = drawn(lm.to(device))
    assert sequences.completion_ids.device.type == device.type
    assert torch.equal(sequences.completion_ids.cpu(), expected.completion_ids)
    assert torch.allclose(ours.cpu(), log_probs, rtol=0, atol=1e-6)
    assert torch.allclose(spread.cpu(), entropy, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ["cached", "generate"])
@pytest.mark.parametrize("chunk", [0, 7])
def test_captured_log_probs_are_those_of_a_fresh_forward(device, engine, chunk):
    lm = tiny_lm("gpt2").to(device)
    sequences, log_probs, _ = drawn(lm, engine)
    with torch.no_grad():
        fresh = Policy(lm, logprob_chunk=chunk)(sequences).log_probs
    assert torch.allclose(log_probs.double(), fresh, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["policy.reference_share=.25", "policy.logprob_chunk=9", "estimator={name: rloo, num_epochs: 2}"],
        ["policy.replay_steps=1", "objective=regularise", "estimator={name: ppo, critic: prefixes}"],
    ],
    ids=["rloo", "ppo of prefixes"],
)
def test_a_whole_run_trains_on_the_device(device, start, data, tmp_path, monkeypatch, words):
    made, trained_on = Training.__init__, []

    def remember(self, *args, **kwargs):
        made(self, *args, **kwargs)
        trained_on.append(next(self.policy.parameters()).device.type)

    monkeypatch.setattr(stage.Training, "__init__", remember)
    config = tiny.write_config(tmp_path / "tiny.yaml", tiny.raw_config(start, data, tmp_path / "runs"))
    folder = tiny.run(config, *words)
    assert trained_on == [device.type]
    assert (folder.path / "report.md").is_file()
    rows = tiny.jsonl(folder.path / "policy/metrics.jsonl")
    assert all(row["rollout_mismatch"] < 1e-4 for row in rows)
