"""The policy stage with a vLLM server: what it asks, what it makes of the answers, and what happens when none comes.

By a server of the tests' own (vllm_server.py), since vLLM is not installed here; it speaks the same interface.
"""

import json
import re
import time
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_rollout import p_value
from tiny import PATTERN, jsonl, run, same, two_processes, weights, without_time, write_config
from toy import (
    EOS,
    LENGTH,
    PROMPTS,
    TEXTS,
    TOKENIZER,
    P,
    exact_log_probs,
    perturbed,
    text_index,
    tiny_lm,
    with_adapter,
)
from transformers import GenerationConfig
from vllm_server import VllmServer

from rlhf_fdiv.config.options import PolicyOptions, VllmOptions
from rlhf_fdiv.models import Policy
from rlhf_fdiv.rollout import Rollout, uniforms
from rlhf_fdiv.sequences import sequence_sum
from rlhf_fdiv.stages import policy as policy_stage
from rlhf_fdiv.stages.policy_server import Server
from rlhf_fdiv.stages.training import launch


@pytest.fixture
def serve():
    """serve(folder) → a server, stopped in the end."""
    servers = []

    def serve(folder):
        servers.append(VllmServer(str(folder)))
        return servers[-1]

    yield serve
    for server in servers:
        server.stop()


@pytest.fixture
def toy_server(serve, tmp_path):
    """A model over the enumerable language, its server, whose generation config would shape the samples, and our client."""
    lm = tiny_lm()
    shaped = {"temperature": 0.3, "top_k": 2, "top_p": 0.5, "min_p": 0.3, "repetition_penalty": 1.5}
    lm.generation_config = GenerationConfig(do_sample=True, **shaped)
    lm.save_pretrained(tmp_path / "served")
    served = serve(tmp_path / "served")
    options = PolicyOptions(engine="vllm", vllm=VllmOptions(url=served.url))
    training = SimpleNamespace(options=options, out=tmp_path, accelerator=launch("", 0))
    return lm, served, Server(training, TOKENIZER)


def draw(client, k, seed=0):
    return client.sample(PROMPTS, k, uniforms(seed, 1, P * k, LENGTH))


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_completions_have_the_distribution_of_the_weights_whatever_the_generation_config_says(toy_server):
    lm, _, client = toy_server
    with torch.no_grad():
        log_pi = exact_log_probs(Policy(lm))
    k = 2000
    sequences, log_probs, entropy = draw(client, k)
    assert p_value(sequences, log_pi, k) > 1e-4
    assert p_value(sequences, torch.softmax(1.2 * log_pi, 1).log(), k) < 1e-6, "the test has the power to see others"
    exact = log_pi[torch.arange(P).repeat_interleave(k), text_index(sequences.completion_ids, sequences.mask)]
    assert torch.allclose(sequence_sum(log_probs, sequences.mask).double(), exact, rtol=0, atol=1e-5)
    by_prompt = sequence_sum(entropy, sequences.mask).view(P, k).double()
    wanted = torch.special.entr(log_pi.exp()).sum(1)  # by the chain rule, the mean of the visited states' entropies
    assert ((by_prompt.mean(1) - wanted).abs() <= 4 * by_prompt.std(1) / k**0.5).all()


def test_a_completion_ends_with_its_eos_or_at_the_maximal_length_and_not_with_the_models_own_eos(toy_server):
    _, served, client = toy_server
    served.lm.config.eos_token_id = 1  # of a chat model, say: here it is a word like others
    sequences, *_ = draw(client, 100)
    finished = Rollout(sequences, None, None, [*range(P)]).finished([EOS])
    lengths = sequences.mask.sum(1)
    last = sequences.completion_ids.gather(1, lengths[:, None] - 1).squeeze(1)
    assert torch.equal(finished, last == EOS)
    assert (lengths[~finished] == LENGTH).all()
    assert (lengths < LENGTH).any() and (~finished).any()  # noqa: PT018
    assert (sequences.completion_ids[lengths > 1] == 1).any()
    assert [TEXTS[i] for i in text_index(sequences.completion_ids, sequences.mask)], "all of them are texts"
    assert sequences.prompt_mask.sum(1).tolist() == [len(p) for p in PROMPTS for _ in range(100)]


def test_the_same_noise_draws_the_same_and_a_prompts_do_not_depend_on_the_others(toy_server):
    *_, client = toy_server
    first, again, other = (draw(client, 20, seed)[0].completion_ids for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    noise = uniforms(1, 1, P * 20, LENGTH)
    alone, *_ = client.sample(PROMPTS[1:2], 20, noise[20:40])
    assert torch.equal(alone.completion_ids, first[20:40, : alone.mask.shape[1]])
    twice, *_ = client.sample([PROMPTS[0]] * 2, 20, noise[:40])
    assert not torch.equal(twice.completion_ids[:20], twice.completion_ids[20:]), "prompts share no random stream"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_after_a_sync_the_servers_log_probs_are_the_policys(toy_server, lora, tmp_path):
    lm, _, client = toy_server
    policy = Policy(with_adapter(lm) if lora else perturbed(lm))
    for synced in (False, True):
        if synced:
            client.holding(policy)
        sequences, log_probs, _ = draw(client, 50)
        with torch.no_grad():
            apart = float((policy(sequences).log_probs - log_probs).abs().max())
        assert apart <= 1e-5 if synced else apart > 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["served"], "the weights do not stay on the disk"


@pytest.mark.slow
def test_weights_make_what_another_model_drew_a_sample_of_the_policy(toy_server):
    """E[log π], by samples of a server that is sharper than the policy."""
    lm, served, client = toy_server
    served.sharper, k, policy = 1.25, 3000, Policy(lm)
    batch = Rollout(*draw(client, k), [*range(P)])
    with torch.no_grad():
        log_pi, exact = policy(batch.sequences).log_probs, -torch.special.entr(exact_log_probs(policy).exp()).sum(1)
    w = batch.off_policy(log_pi, log_pi, 0.0).weights(1e9).double()
    assert torch.allclose(w.log(), sequence_sum(log_pi - batch.log_probs, batch.sequences.mask), rtol=0, atol=1e-5)
    weighted, plain = ((x * sequence_sum(log_pi, batch.sequences.mask)).view(P, k) for x in (w, torch.ones_like(w)))
    off = [((x.mean(1) - exact) / x.std(1) * k**0.5).abs().max() for x in (weighted, plain)]
    assert off[0] < 4
    assert off[1] > 6, "without them the samples are of something else"
    gap = ((log_pi - batch.log_probs).abs() * batch.sequences.mask).sum() / batch.sequences.mask.sum()
    assert client.mismatch(log_pi, batch) == pytest.approx(float(gap), rel=1e-6)
    assert 0.01 < float(gap) < 0.3


# -- the policy stage --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(serve, start):
    return serve(start)


@pytest.fixture
def config(start, data, tmp_path, server):
    raw = tiny.raw_config(start, data, tmp_path / "runs")
    raw |= {"stages": ["policy"], "scorers": {"praise": {"name": "pattern", "pattern": PATTERN}}, "report_to": "none"}
    raw["model"]["lora"] = None
    raw["policy"] |= {"model": start, "engine": "vllm", "vllm": {"url": server.url, "timeout": 20}}
    raw["target"] = {"name": "tilted", "reward": "praise", "beta": 0.2}
    return write_config(tmp_path / "policy.yaml", raw)


@pytest.fixture
def policy(config):
    return lambda *overrides: run(config, *overrides).path / "policy"


@pytest.mark.slow
def test_a_run_learns_and_its_weights_are_one(policy, server):
    out = policy(
        "policy.max_steps=20", "policy.learning_rate=4e-3", "policy.num_prompts=12", "policy.num_generations=32",
        "policy.per_device_train_batch_size=384",
    )  # fmt: skip
    rows = jsonl(out / "metrics.jsonl")
    praise = [row["praise"] for row in rows]
    assert min(praise[-5:]) > praise[0] + 4 * (2 * 0.25 / 384) ** 0.5, "four standard errors of two shares of 384"
    assert all(row["rollout_mismatch"] <= 1e-5 and row["clipped_importance"] == 0 for row in rows)
    assert all(row["ess_importance"] == pytest.approx(384, abs=0.05) for row in rows)
    synced = [body["kwargs"]["weights_path"] for path, body in server.asked if path == "/collective_rpc"]
    assert len(synced) == len({*synced}) == 21, "before each rollout, that of the self-check included"
    assert not [*out.glob(".vllm*")]


@pytest.mark.slow
@pytest.mark.parametrize("args", [[], ["model.lora={r: 2}"], ["policy.replay_steps=1"],
                                  ["estimator={name: ppo, num_epochs: 2, num_minibatches: 2}", "objective=regularise"],
                                  ["policy.warm_start_generations=4", "divergence=js"]],
                         ids=["rloo", "lora", "replay", "ppo", "warm start"])  # fmt: skip
def test_a_stopped_run_ends_bit_for_bit_as_one_that_was_not_on_another_server_too(
    policy, serve, start, monkeypatch, args
):
    whole, logged = policy(*args, "name=whole"), policy_stage.Log.step

    def stop(self, now, *rest):
        if now == 4:
            raise KeyboardInterrupt
        return logged(self, now, *rest)

    monkeypatch.setattr(policy_stage.Log, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        policy(*args, "name=broken")
    monkeypatch.undo()
    out = policy(*args, "name=broken", f"policy.vllm.url={serve(start).url}")
    assert without_time(jsonl(whole / "metrics.jsonl")) == without_time(jsonl(out / "metrics.jsonl"))
    assert same(weights(whole / "model"), weights(out / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("cap", [10.0, 1.01])
def test_what_a_server_of_other_precision_drew_is_weighted_and_the_mismatch_is_logged(policy, server, monkeypatch, cap):
    server.sharper, kept, log = 1.05, [], policy_stage.Log.step

    def step(self, now, batch, *rest):
        kept.append(batch)
        return log(self, now, batch, *rest)

    sampled, drawn = Server.sample, []
    monkeypatch.setattr(Server, "sample", lambda *args: drawn.append(sampled(*args)) or drawn[-1])
    monkeypatch.setattr(policy_stage.Log, "step", step)
    out = policy(f"policy.max_importance_weight={cap}")
    for row, batch, (_, log_mu, _) in zip(jsonl(out / "metrics.jsonl"), kept, drawn[1:], strict=True):
        mask = batch.sequences.mask
        gap = batch.log_probs - log_mu
        assert row["rollout_mismatch"] == pytest.approx(float((gap.abs() * mask).sum() / mask.sum()), rel=1e-4)
        assert row["rollout_mismatch"] > 0.005
        w = sequence_sum(gap, mask).exp().clamp(max=cap)
        assert row["ess_importance"] == pytest.approx(float(w.sum() ** 2 / (w**2).sum()), rel=1e-4)
        assert row["clipped_importance"] == pytest.approx(float((w >= cap).float().mean()), abs=1e-6)
        assert torch.allclose(batch.weights(cap), w, rtol=1e-4)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def problem(policy, *overrides):
    (only,) = tiny.problems(policy, *overrides)
    assert "docs/faster_and_larger.md" in only
    return only


def without_ids(answer):
    return answer | {"choices": [{k: v for k, v in c.items() if k != "token_ids"} for c in answer["choices"]]}


def cut(answer):
    return json.loads(json.dumps(answer).replace('"token_ids": [', '"token_ids": [5, '))


FAULTS = {
    "no vLLM": ("/v1/models", lambda answer: b"<html>", "does not answer as vLLM 0.32 does"),
    "no development mode": ("/collective_rpc", lambda answer: 404, "/collective_rpc answers 404"),
    "refused": ("/v1/completions", lambda answer: 400, "/v1/completions answers 400: .*asked to fail"),
    "too old": ("/v1/completions", without_ids, "as vLLM 0.32 does: KeyError..token_ids"),
    "ids of others": ("/v1/completions", cut, "as vLLM 0.32 does: .*a completion of"),
    "too few": ("/v1/completions", lambda x: x | {"choices": x["choices"][1:]}, "0 completions in place of 1"),
    "null": ("/v1/completions", lambda answer: None, "as vLLM 0.32 does"),
    "half an answer": ("/v1/completions", lambda answer: b'{"choices": [', "as vLLM 0.32 does"),
    "busy": ("/reset_prefix_cache", lambda answer: {"success": False}, "at work for others"),
    "hung": ("/v1/completions", lambda answer: time.sleep(3) or answer,
    r"does not answer: timed out \(policy.vllm.timeout is 1 s"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_of_a_server_is_one_clear_message(policy, server, case):
    path, fault, message = FAULTS[case]
    server.faults[path] = fault
    found = problem(policy, "policy.vllm.timeout=1")
    assert re.search(message, found)
    assert f"{server.url}" in found
    assert "There is no checkpoint yet: the same command begins this stage anew" in found


def test_no_server_at_all(policy, server):
    server.stop()
    assert "does not answer: [Errno 111] Connection refused" in problem(policy)


@pytest.mark.slow
def test_a_server_that_dies_midway_names_the_checkpoint_from_which_another_goes_on(policy, server, serve, start):
    whole = policy("name=whole")
    server.asked.clear()

    def die(answer):
        return answer if sum(path == "/collective_rpc" for path, _ in server.asked) < 5 else b""

    server.faults["/v1/completions"] = die
    found = problem(policy, "name=broken")
    assert "broken/policy/checkpoint-2 is intact" in found
    out = policy("name=broken", f"policy.vllm.url={serve(start).url}")
    assert same(weights(whole / "model"), weights(out / "model"))


def test_a_server_of_another_vocabulary_is_named_before_anything_is_trained(policy, serve, start, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig.from_pretrained(start, vocab_size=30)).save_pretrained(tmp_path / "other")
    found = problem(policy, f"policy.vllm.url={serve(tmp_path / 'other').url}")
    assert "/collective_rpc answers 500" in found
    assert "with the model that this run starts from" in found


def test_a_server_of_another_model_that_takes_the_weights_fails_the_self_check(policy, server):
    server.sharper = 1.5
    (found,) = tiny.problems(policy)
    assert "self-check: rollout and a fresh forward differ by" in found
    assert "a server of another model" in found


def test_two_runs_on_one_server_are_noticed(policy, server):
    def other(answer):
        if sum(path == "/collective_rpc" for path, _ in server.asked) == 4:
            server.lm = perturbed(server.lm, scale=0.3)
        return answer

    server.faults["/reset_prefix_cache"] = other
    found = problem(policy)
    assert "nats a token: does another run use it?" in found
    assert "checkpoint-2 is intact" in found


def test_a_folder_that_cannot_be_written(policy, tmp_path):
    assert "policy.vllm.folder: the weights cannot be written" in problem(
        policy, f"policy.vllm.folder={tmp_path / 'no'}"
    )


@pytest.mark.parametrize(("overrides", "message"), [
    (["policy.vllm=null"], "policy.vllm: is what policy.engine=vllm needs, {url: http://HOST:PORT}"),
    (["policy.engine=cached"], "and no other engine takes"),
    (["policy.vllm.url=null"], "policy.vllm.url: "),
    (["policy.vllm.url=localhost:8000"], "policy.vllm.url: "),
    (["policy.vllm.url=file:///etc/passwd"], "policy.vllm.url: "),
    (["policy.vllm.timout=3"], "policy.vllm.timout: unknown key; did you mean 'timeout'?"),
    (["policy.vllm.timeout=0"], "policy.vllm.timeout: "),
    (["policy.reference_share=.3"], "policy.reference_share: what the reference drew has no density"),
])  # fmt: skip
def test_a_wrong_config_names_its_key(policy, overrides, message):
    (found,) = tiny.problems(policy, *overrides)
    assert message in found


# -- many processes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_draw_what_one_does_and_neither_waits_for_a_server_that_fails(policy, config, server):
    one = jsonl(policy("name=one") / "metrics.jsonl")
    server.asked.clear()
    said = two_processes("-m", "rlhf_fdiv.stages.policy", config, "name=two")
    folder = policy("name=two")  # finished, hence only its path
    rows = jsonl(folder / "metrics.jsonl")
    assert len(rows) == len(one) == 4, said
    for a, b in zip(one, rows, strict=True):
        assert {k: b[k] for k in ("praise", "length", "tokens")} == {k: a[k] for k in ("praise", "length", "tokens")}
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
    assert sum(path == "/collective_rpc" for path, _ in server.asked) == 5, "the main process alone hands weights over"
    server.faults["/collective_rpc"] = lambda answer: 500
    began = time.monotonic()
    said = two_processes("-m", "rlhf_fdiv.stages.policy", config, "name=failing")
    assert said.count("/collective_rpc answers 500") == 1, said
    assert not said.startswith("hung")
    assert time.monotonic() - began < 120
