"""Completions of the steps before, trained on again: `replay_steps`, and that it estimates the same gradient."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny import PATTERN, jsonl, problems, raw_config, run, same, weights, without_time, write_config
from toy import (
    LENGTH,
    PROMPTS,
    TOKENIZER,
    N,
    everything,
    exact_log_probs,
    gradient,
    perturbed,
    tiny_lm,
)

from rlhf_fdiv import divergences
from rlhf_fdiv.config.options import PolicyOptions
from rlhf_fdiv.estimators import RLOO
from rlhf_fdiv.models import Policy
from rlhf_fdiv.objectives import Match, token_rewards
from rlhf_fdiv.replay import Replay, Scored
from rlhf_fdiv.rollout import Rollout, sample, uniforms
from rlhf_fdiv.sequences import sequence_sum
from rlhf_fdiv.stages import policy as policy_stage
from rlhf_fdiv.stages.policy_update import update
from rlhf_fdiv.stages.training import Training

K = 4


def moving(distance):
    """The policy `distance` further on, in float64."""
    return Policy(perturbed(tiny_lm("gpt2"), scale=0.1 + distance)).double()


def drawn(policy, step):
    """The stage's own draws, all with a score of their own, and log a of a model apart."""
    ids = [PROMPTS[i] for i in (step % 3, (step + 1) % 3)]
    sequences, log_probs, entropy = sample(policy.lm, TOKENIZER, ids, K, uniforms(3, step, 2 * K, LENGTH))
    with torch.no_grad():
        log_a = Policy(tiny_lm("gpt2")).double()(sequences).log_probs
    reward = torch.sin(sequences.completion_ids.double().sum(1) + step)
    return Scored(
        Rollout(sequences, log_probs.double(), entropy, [step % 3, (step + 1) % 3]), log_a, {"reward": reward}
    )


def test_what_is_kept_comes_after_the_new_with_the_policy_of_now_and_the_weight_of_its_own_time():
    replay, policies = Replay(2, Accelerator(cpu=True)), [moving(d) for d in (0.0, 0.1, 0.2, 0.3)]
    steps = [drawn(policy, i) for i, policy in enumerate(policies)]
    for i, (policy, new) in enumerate(zip(policies, steps, strict=True)):
        whole = replay.beside(new, policy, size=3)
        parts = [steps[i], *steps[max(i - 2, 0) : i]]  # the one before the last three is forgotten
        assert whole.batch.prompts == [p for part in parts for p in part.batch.prompts]
        now = [policy(part.batch.sequences).log_probs for part in parts]
        for j, part in enumerate(parts):
            rows = slice(2 * K * j, 2 * K * (j + 1))
            kept, length = whole.batch.sequences.mask[rows], part.batch.sequences.mask.shape[1]
            assert torch.equal(kept[:, :length], part.batch.sequences.mask)
            assert not kept[:, length:].any()
            assert torch.equal(whole.batch.sequences.completion_ids[rows, :length], part.batch.sequences.completion_ids)
            torch.testing.assert_close(whole.batch.log_probs[rows, :length], now[j].detach(), rtol=0, atol=1e-6)
            assert torch.equal(whole.log_a[rows, :length], part.log_a)
            assert torch.equal(whole.scores["reward"][rows], part.scores["reward"])
            drawn_by = sequence_sum(part.batch.log_probs, part.batch.sequences.mask)
            assert torch.equal(whole.batch.log_mu[rows], drawn_by)
        if i:
            assert (whole.batch.weights(10.0)[: 2 * K] == 1).all(), "what is new has no weight but 1"
            assert (whole.batch.weights(10.0)[2 * K :] - 1).abs().max() > 0.05
        else:
            assert whole is new


@pytest.mark.slow
def test_the_mean_over_all_that_two_policies_may_have_drawn_is_the_exact_gradient():
    """All pairs of texts of one prompt, from the policy and from an earlier one: each half by itself is unbiased."""
    f, now, then = divergences.get("js"), moving(0.2), moving(0.0)
    texts = everything()[torch.arange(N)]
    mask, potential = texts.mask, torch.sin(texts.completion_ids.double().sum(1))
    with torch.no_grad():
        log_a = Policy(tiny_lm("gpt2")).double()(texts).log_probs
        log_now, log_then = now(texts).log_probs, then(texts).log_probs
    log_p = (sequence_sum(log_a, mask) + potential).log_softmax(0)
    log_z = torch.logsumexp(sequence_sum(log_a, mask) + potential, 0).expand(N)
    exact = gradient(divergences.exact(f, exact_log_probs(now)[0], log_p), now)
    pairs = torch.cartesian_prod(torch.arange(N), torch.arange(N))
    rows = pairs.flatten()
    for log_mu in (log_now, log_then):
        mu = sequence_sum(log_mu, mask)
        part = Rollout(texts[rows], log_mu[rows], torch.zeros_like(log_mu[rows]), [0] * len(pairs))
        replay = Replay(1, Accelerator(cpu=True))
        replay.beside(Scored(part, log_a[rows], {"r": potential[rows]}), then, 4096)
        whole = replay.beside(Scored(part, log_a[rows], {"r": potential[rows]}), now, 4096)
        older = slice(len(rows), None)
        rewards = token_rewards(Match(), f, whole.batch.log_probs[older], whole.log_a[older], mask[rows],
                                whole.scores["r"][older], log_z[rows])  # fmt: skip
        advantages = RLOO()(rewards, mask[rows], 2, weights=whole.batch.weights(float("inf"))[older]).advantages
        chance = mu[pairs].sum(1).exp().repeat_interleave(2) / 2
        total = torch.zeros(N, mask.shape[1], dtype=torch.float64).index_add(0, rows, chance[:, None] * advantages)
        found = gradient(-(total * now(texts).log_probs).sum(), now)
        assert float((found - exact).norm() / exact.norm()) <= 1e-6


@pytest.mark.parametrize("epochs", [1, 2])
def test_one_update_follows_the_weighted_gradient_of_old_and_new(epochs):
    """By hand: Σ w·(s − LOO of w·s)·∇log π over both rollouts, and in a second epoch with the policy as it is by then."""
    f, replay = divergences.get("reverse_kl"), Replay(1, Accelerator(cpu=True))
    policy, lr = moving(0.15), 0.05
    replay.beside(drawn(moving(0.0), 0), policy, 5)
    whole = replay.beside(drawn(policy, 1), policy, 5)
    sequences, mask = whole.batch.sequences, whole.batch.sequences.mask
    by_hand = copy.deepcopy(policy)
    for _ in range(epochs):
        log_pi = sequence_sum(by_hand(sequences).log_probs, mask)
        w = (log_pi - whole.batch.log_mu).exp().clamp(max=1.5).detach().view(-1, K)
        score = (whole.scores["reward"] - (log_pi - sequence_sum(whole.log_a, mask))).detach().view(-1, K)
        others = ((w * score).sum(1, keepdim=True) - w * score) / (K - 1)
        step = gradient((((w * score) - w * others).flatten() * log_pi).mean(), by_hand)
        with torch.no_grad():
            for p, change in zip(
                by_hand.parameters(), step.split([p.numel() for p in by_hand.parameters()]), strict=True
            ):
                p += lr * change.view_as(p)

    def rewards(log_pi, rows=slice(None)):
        length, zero = log_pi.shape[1], torch.zeros(len(mask[rows]), dtype=torch.float64)
        return token_rewards(Match(), f, log_pi, whole.log_a[rows, :length], mask[rows, :length],
                             whole.scores["reward"][rows], zero)  # fmt: skip

    options = PolicyOptions(num_generations=K, per_device_train_batch_size=2 * K, optim="sgd", learning_rate=lr,
                            max_grad_norm=1e9, max_importance_weight=1.5)  # fmt: skip
    before = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
    training = Training(policy, options, Path(), Accelerator(cpu=True))
    figures = update(training, RLOO(num_epochs=epochs), whole.batch, rewards(whole.batch.log_probs), 0, rewards)
    moved, expected = (torch.nn.utils.parameters_to_vector(x.parameters()) - before for x in (policy, by_hand))
    assert float((moved - expected).norm() / expected.norm()) <= 1e-6
    w = whole.batch.weights(1.5)
    assert figures["ess_importance"] == pytest.approx(float(w.sum() ** 2 / (w**2).sum()), rel=1e-6)
    assert 0 < figures["clipped_importance"] < 0.5


# -- the policy stage --------------------------------------------------------------------------------------------------


@pytest.fixture
def policy(start, data, tmp_path):
    raw = raw_config(start, data, tmp_path / "runs")
    raw |= {"stages": ["policy"], "scorers": {"praise": {"name": "pattern", "pattern": PATTERN}}, "report_to": "none"}
    raw["policy"] |= {"model": start, "learning_rate": 1e-2}
    raw["target"] = {"name": "tilted", "reward": "praise", "beta": 0.5}
    path = write_config(tmp_path / "policy.yaml", raw)
    return lambda *overrides: run(path, *overrides).path / "policy"


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ("divergence=forward_kl",),
        ("estimator={name: rloo, num_epochs: 2}", "policy.reference_share=.3"),
        ("objective=regularise", "estimator={name: ppo, num_epochs: 2, num_minibatches: 2}"),
        ("objective=regularise", "estimator={name: ppo, critic: prefixes, num_epochs: 2}"),
        ("objective=regularise", "estimator={name: grpo, num_epochs: 2}"),
        ("target={name: moments, moments: {praise: .6}, num_prompts: 12, dual_learning_rate: .1}",),
    ],
    ids=["rloo", "two epochs, reference share", "ppo", "ppo of prefixes", "grpo", "dual ascent"],
)
def test_every_estimator_trains_on_what_was_drawn_before(policy, args):
    out, alone = (policy(*args, f"policy.replay_steps={n}", f"name=replay{n}") for n in (2, 0))
    rows, without = jsonl(out / "metrics.jsonl"), jsonl(alone / "metrics.jsonl")
    assert rows[0] == pytest.approx({**without[0], "seconds": rows[0]["seconds"]}), "there is nothing before the first"
    assert rows[-1]["kl_reference"] != without[-1]["kl_reference"]
    batch = 16
    assert all(
        batch < row["ess_importance"] <= batch * min(step + 1, 3) + 1e-3 for step, row in enumerate(rows) if step
    )
    assert all(row["tokens"] <= batch * 8 for row in rows), "what is logged is of the new completions alone"


@pytest.mark.slow
def test_a_resume_goes_on_with_what_was_kept_and_refuses_another_number_of_processes(policy, tmp_path, monkeypatch):
    args = (
        "policy.replay_steps=2",
        "policy.max_steps=5",
        "policy.save_steps=2",
        "estimator={name: ppo, critic: prefixes}",
    )
    goal, logged = policy(*args, "name=whole"), policy_stage.Log.step

    class Stopped(BaseException):
        pass

    def stop(self, now, *rest):
        if now == 4:
            raise Stopped
        return logged(self, now, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(policy_stage.Log, "step", stop)
        with pytest.raises(Stopped):
            policy(*args, "name=broken")
    broken = goal.parent.parent / "broken"
    shutil.copytree(broken, tmp_path / "copy" / "broken")
    kept = broken / "policy" / "checkpoint-2" / "replay-0-0000.safetensors"
    shutil.copy(kept, kept.with_name("replay-1-0000.safetensors"))
    (said,) = problems(policy, *args, "name=broken")
    assert "its replay is that of 2 processes" in said
    assert "damaged" not in said
    kept.with_name("replay-1-0000.safetensors").unlink()
    out = policy(*args, "name=broken")
    assert without_time(jsonl(out / "metrics.jsonl")) == without_time(jsonl(goal / "metrics.jsonl"))
    assert same(weights(out / "model"), weights(goal / "model"))
    monkeypatch.setattr(Replay, "load", lambda self, folder: None)
    lost = policy(*args, "name=broken", f"output_dir={tmp_path / 'copy'}")
    assert not same(weights(lost / "model"), weights(goal / "model")), "what was kept matters"
