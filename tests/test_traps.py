"""Each trap that cost peers' users weeks: the library is free of it, and notices it when it is put back in by monkeypatch.

A trap that changes log-probs is found by the self-check before the first update, in words that name the cause; one that
it cannot see, because samples or masks are wrong and log-probs are not, breaks a law that holds without it.

trap                                                put back in, and found by
--------------------------------------------------  ------------------------------------------------------------------
dropout in rollout, reference or policy             self-check: test_dropout_put_back_is_found
dropout in the update, or in scoring for ppo        test_a_model_with_dropout_trains_as_one_without
left padding without position_ids                   self-check: test_positions_that_ignore_left_padding_are_found
pad = eos swallows the real EOS (rollout)           test_a_tokenizer_without_pad_makes_the_same_run, …_in_the_mask_is_found
pad = eos swallows the real EOS (sft labels)        test_sft_with_pad_as_eos_learns_to_end
score paid on PAD, not on EOS                       test_ppo_with_its_score_on_padding_loses_the_gradient
reward read from the pad token                      test_a_head_that_reads_padding_is_found, test_a_classifier_…
forced EOS at the maximal length                    test_a_forced_eos_is_ignored_and_found, test_a_cut_text_gets_no_eos
top-k, top-p, temperature, penalties in the config  test_the_models_generation_config_is_ignored_by_both_engines
the same, in the sampler itself                     self-check: test_a_shaped_softmax_is_found
the same, under log-probs of the whole softmax      test_a_shaped_sampler_breaks_the_law_of_its_log_probs
generate's own top_k = 50                           test_tokens_beyond_the_fifty_likeliest_are_sampled
bf16 rollout under a float32 trainer                self-check: test_a_rollout_in_bfloat16_is_found
bf16 throughout                                     test_a_model_in_bfloat16_…, test_the_engines_log_probs_do_not_…
adapter off where the SFT model was an adapter      self-check: test_an_unmerged_adapter_as_start_is_found
resume re-anchors, or drops any state               test_a_resume_that_drops_something_ends_elsewhere, …_lambdas_…
length-normalised log-probs                         test_a_length_normalised_log_prob_is_another_objective
no self-check                                       test_a_sound_model_passes_the_self_check, test_a_reference_that_moved_…
ZeRO-3 and FSDP generation                          test_two_processes_give_what_one_gives (a whole copy samples)
"""

import contextlib
import copy
import functools
import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from scipy import stats
from tiny import FILMS, PATTERN, WORDS, jsonl, run, same, without_time, write_config
from toy import (
    EOS,
    LENGTH,
    PROMPTS,
    TOKENIZER,
    N,
    P,
    change_adapter,
    everything,
    exact_log_probs,
    gradient,
    label,
    language,
    perturbed,
    scores,
    text_index,
    tiny_lm,
    with_adapter,
)
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rlhf_fdiv import divergences, objectives, reward_models, rollout
from rlhf_fdiv.data import tokenize_completions
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.estimators import PPO, Reinforce, policy_loss
from rlhf_fdiv.model_options import LoraOptions, ModelOptions
from rlhf_fdiv.models import Policy, Reference, load_causal_lm, load_policy, load_tokenizer, save_policy
from rlhf_fdiv.objectives import Match, Regularise, token_rewards
from rlhf_fdiv.reward_models import HeadReward, HiddenStates, load_reward_model
from rlhf_fdiv.rollout import Rollout, sample, uniforms
from rlhf_fdiv.sequences import Sequences, pad, sequence_sum
from rlhf_fdiv.stages import policy as policy_stage
from rlhf_fdiv.stages import policy_rollout, policy_update, sft
from rlhf_fdiv.stages.policy import self_check
from rlhf_fdiv.stages.training import Training
from rlhf_fdiv.targets import DualAscent, LogPartition

FULL, LORA = "model.lora=null", "model.lora={r: 2, lora_alpha: 4}"
full_or_lora = pytest.mark.parametrize("model", [FULL, LORA], ids=["full", "lora"])
every_engine = pytest.mark.parametrize("engine", ["cached", "generate"])
every_lm = pytest.mark.parametrize("architecture", ["llama", "gpt2"])
SHAPED = {"do_sample": True, "temperature": 0.3, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "repetition_penalty": 1.5}
CPU = torch.device("cpu")


def make_model(folder, architecture="gpt2", dropout=0.0, generation=None, **special):
    """A model folder of 24 words in float32; its weights depend on the architecture alone. GPT-2's positions are
    absolute, so wrong ones show; prompts of 5 to 7 tokens are padded on the left."""
    torch.manual_seed(3)
    shared = {"vocab_size": len(WORDS), "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    if architecture == "gpt2":
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2, **rates, **shared)
        lm = GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        shared |= {"max_position_embeddings": 64, "attention_dropout": dropout, "initializer_range": 0.2}
        config = LlamaConfig(**sizes, **shared)
        lm = LlamaForCausalLM(config)
    lm.save_pretrained(folder)
    if generation:
        path = Path(folder) / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | generation))
    tiny.tokenizer(**special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(architecture, …): the model folder of these properties, made once."""
    return functools.cache(lambda *args, **kwargs: make_model(tmp_path_factory.mktemp("model") / "m", *args, **kwargs))


@pytest.fixture
def policy(made, data, tmp_path):
    """policy(model folder, "a.b=value", …): runs the real policy stage for two steps and gives its folder."""

    def policy(start, *overrides):
        raw = tiny.raw_config(start, data, tmp_path / "runs")
        scorers = {"praise": {"name": "pattern", "pattern": PATTERN}, "words": {"name": "length", "scale": 4}}
        raw |= {"stages": ["policy"], "scorers": scorers, "report_to": "none", "divergence": "js"}
        raw["policy"] |= {"model": start, "max_steps": 2, "learning_rate": 3e-2}
        raw["target"] = {"name": "tilted", "reward": "praise", "beta": 0.5}
        runs = len(list(tmp_path.glob("*.yaml")))
        path = write_config(tmp_path / f"run{runs}.yaml", raw)
        return run(path, *overrides).path / "policy"

    return policy


def rows_of(out):
    return without_time(jsonl(out / "metrics.jsonl"))


def problem(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    return "\n".join(caught.value.problems)


def weights(out):
    return load_file(out / "model" / "model.safetensors")


@contextlib.contextmanager
def in_train_mode(module):
    module.train()
    try:
        yield
    finally:
        module.eval()


def p_value(drawn, log_pi, k):
    """χ² of the counts of the enumerated texts, k a prompt, the rare ones together."""
    texts = text_index(drawn.completion_ids, drawn.mask) + N * torch.arange(P).repeat_interleave(k)
    observed, expected = torch.bincount(texts, minlength=P * N).double(), k * log_pi.exp().flatten()
    rare = expected < 5
    a, b = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (observed, expected))
    return float(stats.chi2.sf(float(((a - b) ** 2 / b).sum()), len(a) - P))


# -- the self-check passes where all is well ---------------------------------------------------------------------------


def drawn_by(policy, tokenizer, folder, engine, length=8, k=8):
    prompts = [tokenizer(f"film : {title} review :")["input_ids"] for title in FILMS]
    noise = uniforms(0, 0, len(prompts) * k, length)
    return Rollout(*sample(policy.lm, tokenizer, prompts, k, noise, engine), [*range(len(prompts))])


@every_engine
@full_or_lora
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "special"), [("llama", {}), ("gpt2", {"eos_token": "<eos>"})], ids=["llama", "gpt2, pad = eos"]
)
def test_a_sound_model_passes_the_self_check(made, architecture, engine, model, dtype, special):
    """With dropout in its config, prompts of unequal length, texts that end and texts that are cut."""
    folder = made(architecture, 0.3, **special)
    lora = LoraOptions(r=2, lora_alpha=4) if model == LORA else None
    options = ModelOptions(folder, dtype=dtype, lora=lora)
    policy, reference = load_policy(folder, options, value_head=True)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) == bool(special)
    batch = drawn_by(policy, tokenizer, folder, engine)
    finished, mask = batch.finished([1]), batch.sequences.mask
    assert finished.any()
    assert not finished.all()
    assert (batch.sequences.prompt_mask == 0).any()
    self_check(policy, reference, batch)
    with torch.no_grad():
        scored = policy(batch.sequences).log_probs
    assert torch.equal(scored, reference.log_probs(batch.sequences)), "D(π‖a) = 0, exactly"
    assert ((scored - batch.log_probs) * mask).abs().max() <= (0.03 if dtype == "bfloat16" else 1e-5)


@full_or_lora
def test_a_reference_that_moved_is_found(made, policy, monkeypatch, model):
    load = policy_stage.load_policy

    def moved(*args):
        policy, reference = load(*args)
        if model == LORA:
            change_adapter(policy.lm)
        else:
            reference.policy.lm.get_output_embeddings().weight.data.mul_(1.01)
        return policy, reference

    monkeypatch.setattr(policy_stage, "load_policy", moved)
    assert "policy and reference differ" in problem(policy, made(), model)


# -- dropout -----------------------------------------------------------------------------------------------------------

PPO_RUN = ("objective=regularise", "estimator={name: ppo, num_epochs: 2, num_minibatches: 2}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "args"),
    [("gpt2", (FULL,)), ("llama", (LORA,)), ("gpt2", (LORA, *PPO_RUN)), ("llama", (FULL, "policy.reference_share=.4"))],
    ids=["full", "lora", "ppo", "share"],
)
def test_a_model_with_dropout_trains_as_one_without(made, policy, monkeypatch, architecture, args):
    """Bit for bit: rollout, scoring by reference and policy, and update. With dropout in the update, or in the scoring
    that ppo and off-policy weights rest on, the runs part: no self-check sees those."""
    plain = policy(made(architecture), *args)
    dropped = policy(made(architecture, 0.3), *args)
    assert rows_of(dropped) == rows_of(plain)
    assert same(weights(dropped), weights(plain))

    step, forward = Training.step, policy_update.in_micro_batches

    def training(self, *args):
        with in_train_mode(self.policy):
            return step(self, *args)

    def scoring(policy, *rest):
        with in_train_mode(policy):
            return forward(policy, *rest)

    monkeypatch.setattr(Training, "step", training)
    assert rows_of(policy(made(architecture, 0.3), *args)) != rows_of(plain)
    monkeypatch.setattr(Training, "step", step)
    if len(args) > 1:
        monkeypatch.setattr(policy_update, "in_micro_batches", scoring)
        monkeypatch.setattr(policy_rollout, "in_micro_batches", scoring)
        assert rows_of(policy(made(architecture, 0.3), *args)) != rows_of(plain)


@every_lm
@full_or_lora
@pytest.mark.parametrize("where", ["rollout", "reference", "policy"])
def test_dropout_put_back_is_found(made, policy, monkeypatch, architecture, model, where):
    load, draw = policy_stage.load_policy, policy_rollout.sample

    def loaded(*args):
        policy, reference = load(*args)
        (policy if where == "policy" else reference.policy).train()
        return policy, reference

    def drawn(lm, *args):
        with in_train_mode(lm):
            return draw(lm, *args)

    if where == "rollout":
        monkeypatch.setattr(policy_rollout, "sample", drawn)
    else:
        monkeypatch.setattr(policy_stage, "load_policy", loaded)
    message = problem(policy, made(architecture, 0.3), model)
    assert message.startswith("self-check: ")
    assert "ropout" in message


# -- left padding ------------------------------------------------------------------------------------------------------


def without_positions(module, args, kwargs):
    return args, {k: v for k, v in kwargs.items() if k != "position_ids"}


@full_or_lora
@pytest.mark.parametrize("where", ["scoring", "rollout"])
def test_positions_that_ignore_left_padding_are_found(made, policy, monkeypatch, model, where):
    """With GPT-2, whose positions are absolute; rotary ones are relative, and a shift of all of them changes nothing."""
    inputs, draw = Sequences.model_inputs, policy_rollout.sample

    def drawn(lm, *args):
        base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        hook = base.register_forward_pre_hook(without_positions, with_kwargs=True)
        try:
            return draw(lm, *args)
        finally:
            hook.remove()

    if where == "scoring":
        monkeypatch.setattr(
            Sequences, "model_inputs", lambda self: {k: v for k, v in inputs(self).items() if k != "position_ids"}
        )
    else:
        monkeypatch.setattr(policy_rollout, "sample", drawn)
    assert "positions under left padding" in problem(policy, made("gpt2"), model)


@every_lm
def test_a_prompt_padded_on_the_left_gives_the_text_it_gives_alone(architecture):
    """The law, for the sampler and for the score of its text."""
    policy, _ = language(architecture)
    noise = uniforms(0, 0, P * 20, LENGTH)
    together, log_probs, _ = sample(policy.lm, TOKENIZER, PROMPTS, 20, noise)
    assert (together.prompt_mask == 0).any()
    for i, prompt in enumerate(PROMPTS):
        rows = slice(20 * i, 20 * i + 20)
        alone, its_log_probs, _ = sample(policy.lm, TOKENIZER, [prompt], 20, noise[rows])
        length = alone.mask.shape[1]
        assert torch.equal(alone.mask, together.mask[rows, :length])
        assert torch.equal(alone.completion_ids * alone.mask, (together.completion_ids * together.mask)[rows, :length])
        assert torch.allclose(log_probs[rows, :length], its_log_probs, rtol=0, atol=1e-10)


# -- pad = eos ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_engine
@pytest.mark.parametrize(
    ("architecture", "args"),
    [("gpt2", (FULL,)), ("llama", (LORA, "policy.reference_share=.4"))],
    ids=["gpt2-full", "llama-lora-share"],
)
def test_a_tokenizer_without_pad_makes_the_same_run(made, policy, monkeypatch, architecture, engine, args):
    """Its pad is its EOS; no mask comes from ids, so nothing changes, to the last bit."""
    args = (f"policy.engine={engine}", "policy.max_completion_length=12", *args)
    plain = policy(made(architecture), *args)
    padded = policy(made(architecture, eos_token="<eos>"), *args)
    assert load_tokenizer(made(architecture, eos_token="<eos>")).pad_token_id == 1
    assert rows_of(padded) == rows_of(plain)
    assert same(weights(padded), weights(plain))
    assert any(0 < row["finished"] < 1 for row in rows_of(plain))
    monkeypatch.setattr(
        rollout, "_until_stop", lambda tokens, stops: (tokens != stops[0]).long()
    )  # padding told by its id
    swallowed = rows_of(policy(made(architecture, eos_token="<eos>"), *args))
    assert all(row["finished"] == 0 for row in swallowed)
    assert [row["length"] for row in swallowed] != [row["length"] for row in rows_of(plain)]


@every_engine
def test_an_eos_that_is_swallowed_in_the_mask_is_found(monkeypatch, engine):
    """A text with its EOS has the probability of that text; without it, it is no text of the language."""
    policy, _ = language("gpt2")
    with torch.no_grad():
        log_pi = exact_log_probs(policy)
    tokenizer = type("Tokenizer", (), {"eos_token_id": EOS, "pad_token_id": EOS})

    def text_log_probs():
        drawn, log_probs, _ = sample(policy.lm, tokenizer, PROMPTS, 30, uniforms(0, 0, P * 30, LENGTH), engine)
        texts = text_index(drawn.completion_ids, drawn.mask) + N * torch.arange(P).repeat_interleave(30)
        return sequence_sum(log_probs, drawn.mask).double() - log_pi.flatten()[texts]

    assert text_log_probs().abs().max() <= 1e-5
    monkeypatch.setattr(rollout, "_until_stop", lambda tokens, stops: (tokens != stops[0]).long())
    with pytest.raises(ValueError, match="outside the language"):
        text_log_probs()


@pytest.mark.slow
def test_sft_with_pad_as_eos_learns_to_end(made, data, tmp_path, monkeypatch):
    def trained(start):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        raw = tiny.raw_config(start, data, folder) | {"stages": ["sft"], "report_to": "none"}
        raw["sft"]["max_steps"] = 15
        out = run(write_config(tmp_path / f"{folder.name}.yaml", raw)).path / "sft"
        lm, tokenizer = load_causal_lm(str(out / "model"), ModelOptions("")), load_tokenizer(str(out / "model"))
        batch = drawn_by(Policy(lm), tokenizer, None, "cached", length=12)
        return weights(out), float(batch.finished([1]).float().mean())

    ours, ended = trained(made("gpt2"))
    again, ended_again = trained(made("gpt2", eos_token="<eos>"))
    assert same(ours, again)
    assert ended == ended_again > 0.9
    loss = sft.DivergenceSFTTrainer.compute_loss

    def masked(self, model, inputs, *args, **kwargs):
        labels = inputs["labels"].masked_fill(inputs["input_ids"] == 1, -100)  # what a pad = eos collator does
        return loss(self, model, {**inputs, "labels": labels}, *args, **kwargs)

    monkeypatch.setattr(sft.DivergenceSFTTrainer, "compute_loss", masked)
    other, never = trained(made("gpt2", eos_token="<eos>"))
    assert not same(ours, other)
    assert never < 0.5, "a model whose EOS was swallowed never learns to stop"


# -- where the score is paid, and from where a reward is read ----------------------------------------------------------


def gradient_error(f, objective, estimator):
    """How far the library's gradient, summed exactly over the language, lies from that of the objective itself."""
    policy, reference = language("gpt2")
    whole, potential = everything(), scores()["reward"] / 0.7
    log_probs, log_a = policy(whole).log_probs, reference(whole).log_probs.detach()
    by_text = [(x * whole.mask).sum(1).view(P, N) for x in (log_probs, log_a)]
    tilt = potential.view(P, N)
    if isinstance(objective, Match):
        loss = divergences.exact(f, by_text[0], (by_text[1] + tilt).log_softmax(1)).mean()
    else:
        reward = (by_text[0].exp() * objective.beta * tilt).sum(1)
        loss = (objective.beta * divergences.exact(f, *by_text) - reward).mean()
    log_z = torch.logsumexp(by_text[1] + tilt, 1).repeat_interleave(N)
    rewards = token_rewards(objective, f, log_probs.detach(), log_a, whole.mask, potential, log_z)
    advantages, _ = estimator(rewards, whole.mask, 1, torch.zeros_like(rewards))
    chance = by_text[0].detach().exp().flatten() / P
    found = gradient((chance * policy_loss(log_probs, log_probs.detach(), advantages, whole.mask)).sum(), policy)
    exact = gradient(loss, policy)
    return float((found - exact).norm() / exact.norm())


ONE_PASS = PPO(num_epochs=1, num_minibatches=1, lam=1.0, whiten_advantages=False)
ALL_F = [divergences.get(name) for name in ("reverse_kl", "forward_kl", "js")]
every_f = pytest.mark.parametrize("f", ALL_F, ids=label)
every_objective = pytest.mark.parametrize("objective", [Match(), Regularise(beta=0.3)], ids=label)


@every_f
@every_objective
def test_ppo_with_its_score_on_padding_loses_the_gradient(monkeypatch, f, objective):
    """reinforce and its kin sum the row, so it is ppo that would never hear of a score behind EOS."""
    assert gradient_error(f, objective, ONE_PASS) <= 1e-9

    def at_the_end_of_the_row(score, mask):
        return torch.cat([torch.zeros(len(mask), mask.shape[1] - 1), score[:, None]], 1)

    monkeypatch.setattr(objectives, "at_last_token", at_the_end_of_the_row)
    assert gradient_error(f, objective, ONE_PASS) > 0.05


SHORT_AND_LONG = (
    ["film : one review :", "film : two three four review :", "film : five review :"],
    [" the plot is very very good", " a", " dull"],
)


def head_scores(folder, batch_size):
    states = HiddenStates(folder, "float32", [0.5, 1.0], CPU)
    torch.manual_seed(0)
    size = len(states.layers) * 32
    head = HeadReward(states, {}, torch.randn(size), torch.zeros(size), torch.ones(size))
    return torch.tensor(head.score(*SHORT_AND_LONG, batch_size))


@every_lm
@pytest.mark.parametrize("special", [{}, {"eos_token": "<eos>"}], ids=["pad", "pad = eos"])
def test_a_head_that_reads_padding_is_found(made, monkeypatch, architecture, special):
    """A text's score is its own, whatever it is padded beside."""
    folder = made(architecture, **special)
    alone = head_scores(folder, 1)
    assert alone.std() > 0.1
    assert torch.allclose(head_scores(folder, 3), alone, rtol=0, atol=1e-4)
    padded = reward_models.pad

    def no_mask(*args):
        ids, mask = padded(*args)
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(reward_models, "pad", no_mask)
    assert (head_scores(folder, 3) - alone).abs().max() > 0.05


@pytest.mark.parametrize("special", [{}, {"eos_token": "<eos>"}], ids=["pad", "pad = eos"])
@pytest.mark.parametrize("broken", ["", "pad_token_id", "padding_side"])
def test_a_classifier_that_reads_padding_is_found(tmp_path, monkeypatch, special, broken):
    """Saved with a wrong pad_token_id, which loading mends; padding on the left would need position_ids."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3,
                        num_labels=1, pad_token_id=5, bos_token_id=None, eos_token_id=1)  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tiny.tokenizer(**special).save_pretrained(tmp_path)
    model = load_reward_model(str(tmp_path), CPU)
    alone = torch.tensor(model.score(*SHORT_AND_LONG, 1))
    if broken == "pad_token_id":
        model.model.config.pad_token_id = 5
    if broken == "padding_side":
        monkeypatch.setattr(reward_models, "pad", lambda rows, value, side: pad(rows, value, "left"))
    together = torch.tensor(model.score(*SHORT_AND_LONG, 3))
    assert torch.allclose(together, alone, rtol=0, atol=1e-5) == (not broken)


# -- a forced EOS ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_forced_eos_is_ignored_and_found(monkeypatch, lora):
    """At the maximal length a text is cut; policy and reference are both normalised over texts that may be."""
    lm = with_adapter(tiny_lm("gpt2")) if lora else perturbed(tiny_lm("gpt2"))
    (lm.get_base_model() if lora else lm).generation_config.forced_eos_token_id = EOS
    k, noise = 1000, uniforms(0, 0, P * 1000, LENGTH)
    with torch.no_grad():
        log_pi = exact_log_probs(Policy(lm))
    drawn, *_ = sample(lm, TOKENIZER, PROMPTS, k, noise, "generate")
    assert p_value(drawn, log_pi, k) > 1e-4
    assert not Rollout(drawn, None, None, []).finished([EOS]).all()
    monkeypatch.setattr(rollout, "_neutral", lambda lm: contextlib.nullcontext())
    forced, *_ = sample(lm, TOKENIZER, PROMPTS, k, noise, "generate")
    assert Rollout(forced, None, None, []).finished([EOS]).all()
    assert p_value(forced, log_pi, k) < 1e-6


@full_or_lora
def test_an_eos_written_over_the_last_token_is_found(made, policy, monkeypatch, model):
    decode = rollout._decode

    def forced(*args):
        tokens, log_probs, entropy = decode(*args)
        tokens[:, -1] = args[-1][0]
        return tokens, log_probs, entropy

    monkeypatch.setattr(rollout, "_decode", forced)
    assert "rollout and a fresh forward differ" in problem(policy, made(), model)


def test_a_cut_text_gets_no_eos():
    """Neither in a rollout nor in the data of prefer and distil: with one, the probabilities would not add up to 1."""
    ids = tokenize_completions(["a", "a"], ["a very good film", "good"], tiny.tokenizer(), 3)
    assert [row[-1] == 1 for row in ids] == [False, True]
    assert [len(row) for row in ids] == [3, 2]
    policy, _ = language("gpt2")
    whole = everything()
    cut = (whole.mask.sum(1) == LENGTH) & (whole.completion_ids[:, -1] != EOS)
    forced = copy.deepcopy(whole)
    forced.completion_ids[cut, -1] = EOS
    with torch.no_grad():
        sums = [sequence_sum(policy(x).log_probs, x.mask).exp().view(P, N).sum(1) for x in (whole, forced)]
    assert torch.allclose(sums[0], torch.ones(P).double(), rtol=0, atol=1e-12)
    assert (sums[1] - 1).abs().min() > 0.01


# -- a shaped sampler --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_engine
@full_or_lora
def test_the_models_generation_config_is_ignored_by_both_engines(made, policy, monkeypatch, engine, model):
    args = (model, f"policy.engine={engine}")
    generation = {**SHAPED, "forced_eos_token_id": 1, "min_new_tokens": 3, "suppress_tokens": [13, 14, 15]}
    shaped_folder = make_model(Path(made()).parent / f"shaped-{engine}-{model == LORA}", generation=generation)
    plain = rows_of(policy(made(), *args))
    assert rows_of(policy(shaped_folder, *args)) == plain
    if engine == "generate":
        monkeypatch.setattr(rollout, "_neutral", lambda lm: contextlib.nullcontext())
        assert rows_of(policy(shaped_folder, *args)) != plain, "the config is read where nothing guards against it"


SHAPES = {
    "temperature": lambda logits: logits / 0.7,
    "top-k": lambda logits: logits.masked_fill(logits < logits.topk(3).values[:, -1:], -math.inf),
    "top-p": lambda logits: logits.masked_fill(logits.softmax(-1) < 0.05, -math.inf),
}


@full_or_lora
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shaped_softmax_is_found(made, policy, monkeypatch, shape, model):
    draw = rollout._inverse_cdf
    monkeypatch.setattr(rollout, "_inverse_cdf", lambda logits, u: draw(SHAPES[shape](logits), u))
    assert "truncated sampler" in problem(policy, made(), model)


FORCED = {
    "temperature": {"temperature": 0.8},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.9},
    "repetition penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize(
    ("lora", "forced"), [(False, None), *((False, x) for x in FORCED), (True, None), (True, "top-k")]
)
def test_a_shaped_sampler_breaks_the_law_of_its_log_probs(monkeypatch, forced, lora):
    """Log-probs of the whole softmax under a shaped sampler pass any comparison with a forward. Two laws find them: χ²
    of the texts, and that a token's −log π is on average the entropy of its state. A mean log-ratio is then no KL."""
    lm = with_adapter(tiny_lm("gpt2")) if lora else perturbed(tiny_lm("gpt2"))
    reference = Policy(tiny_lm("gpt2"))
    base = lm.get_base_model() if lora else lm
    generate = type(base).generate
    if forced:
        monkeypatch.setattr(type(base), "generate", lambda self, **kw: generate(self, **{**kw, **FORCED[forced]}))
    k = 1500
    with torch.no_grad():
        log_pi, log_a = exact_log_probs(Policy(lm)), exact_log_probs(reference)
    drawn, log_probs, entropy = sample(lm, TOKENIZER, PROMPTS, k, uniforms(0, 0, P * k, LENGTH), "generate")
    surprise = sequence_sum(-log_probs.double() - entropy.double(), drawn.mask)
    z = float(surprise.mean() / surprise.std() * math.sqrt(len(surprise)))
    texts = text_index(drawn.completion_ids, drawn.mask) + N * torch.arange(P).repeat_interleave(k)
    shown = float((log_pi - log_a).flatten()[texts].mean())
    print(f"{forced}: χ² p {p_value(drawn, log_pi, k):.2g}, z of surprise − entropy {z:+.1f}, "
          f"KL {float((log_pi.exp() * (log_pi - log_a)).sum(1).mean()):.3f} shown as {shown:.3f}")  # fmt: skip
    with torch.no_grad():
        fresh = Policy(lm)(drawn).log_probs
    assert torch.allclose(log_probs.double(), fresh, rtol=0, atol=1e-5), "a comparison with a forward sees nothing"
    if forced is None:
        assert p_value(drawn, log_pi, k) > 1e-4
        assert abs(z) < 4
    else:
        assert p_value(drawn, log_pi, k) < 1e-6
        assert abs(z) > 4.5


@pytest.mark.parametrize(
    ("engine", "forced"),
    [("cached", None), ("generate", None), ("generate", {"top_k": 50})],
    ids=["cached", "generate", "top_k of transformers 5"],
)
def test_tokens_beyond_the_fifty_likeliest_are_sampled(monkeypatch, engine, forced):
    """transformers 5 cuts at 50 unless told not to, and no config says so: a vocabulary of 24 words would not show it."""
    lm, k = tiny_lm("gpt2", vocab=200), 4000
    generate = type(lm).generate
    if forced:
        monkeypatch.setattr(type(lm), "generate", lambda self, **kw: generate(self, **{**kw, **forced}))
    drawn, *_ = sample(lm, TOKENIZER, [[1, 2]], k, uniforms(0, 0, k, 1), engine)
    with torch.no_grad():
        probabilities = lm(torch.tensor([[1, 2]])).logits[0, -1].softmax(-1)
    beyond = probabilities.argsort()[:150]
    expected, seen = float(probabilities[beyond].sum()), torch.isin(drawn.completion_ids[:, 0], beyond).sum()
    assert expected > 0.1
    assert (stats.binomtest(int(seen), k, expected).pvalue > 1e-4) == (forced is None)


# -- bfloat16 ----------------------------------------------------------------------------------------------------------


@every_engine
def test_a_model_in_bfloat16_is_near_enough_to_its_own_rollout(engine):
    """Fused attention rounds one token after a cache otherwise than a whole text: measured .007 nats a token, of the .1
    that the self-check allows. Eager attention, the default on a CPU, gives the very same numbers here."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 2}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=512, initializer_range=0.08, attn_implementation="sdpa", eos_token_id=1,
                                      pad_token_id=0, bos_token_id=None, **sizes)).bfloat16()  # fmt: skip
    policy, tokenizer = Policy(lm), tiny.tokenizer()
    batch = Rollout(*sample(lm, tokenizer, [[5], [6, 7, 8], [9] * 20], 8, uniforms(0, 0, 24, 20), engine), [0, 1, 2])
    self_check(policy, Reference(policy, adapter_off=False), batch)
    mask = batch.sequences.mask
    with torch.no_grad():
        off = (policy(batch.sequences).log_probs - batch.log_probs) * mask
    by_token, by_text = float(off.abs().sum() / mask.sum()), float(off.sum(1).pow(2).mean().sqrt())
    print(f"{engine}: rollout and forward differ by {by_token:.2g} nats a token, {by_text:.2g} a text (rms)")
    assert 1e-4 < by_token < 0.02


@full_or_lora
def test_a_rollout_in_bfloat16_is_found(made, policy, monkeypatch, model):
    draw = policy_rollout.sample
    monkeypatch.setattr(policy_rollout, "sample", lambda lm, *args: draw(copy.deepcopy(lm).bfloat16(), *args))
    assert "another dtype in the rollout" in problem(policy, made(), model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("estimator", ["rloo", "{name: ppo, num_epochs: 1}", "{name: grpo, num_epochs: 1}"])
def test_the_engines_log_probs_do_not_enter_the_ratio(made, policy, monkeypatch, dtype, estimator):
    """Before the first optimiser step of a rollout the ratio is 1 exactly, whatever an engine claims of its samples."""
    ratios, loss, draw = [], policy_update.policy_loss, policy_rollout.sample

    def watched(log_probs, old, *rest):
        ratios.append((log_probs - old).exp())
        return loss(log_probs, old, *rest)

    def noisy(*args):
        sequences, log_probs, entropy = draw(*args)
        return sequences, log_probs - 0.5 * sequences.mask, entropy

    monkeypatch.setattr(policy_update, "policy_loss", watched)
    monkeypatch.setattr(policy_rollout, "sample", noisy)
    args = (f"model.dtype={dtype}", f"estimator={estimator}", "objective=regularise", "policy.max_steps=1",
            "policy.per_device_train_batch_size=16")  # fmt: skip
    assert "rollout and a fresh forward differ" in problem(policy, made(), *args)
    monkeypatch.setattr(policy_stage, "self_check", lambda *args: None)
    (row,) = rows_of(policy(made(), *args))
    assert torch.equal(ratios[0], torch.ones_like(ratios[0]))
    assert row["rollout_mismatch"] == pytest.approx(0.5, abs=0.02)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(made, tmp_path):
    """The folder of an SFT model that is an adapter on its base, and the log-probs that it gives a batch."""
    options = ModelOptions(made("llama"), lora=LoraOptions(r=2, lora_alpha=4))
    start, _ = load_policy(made("llama"), options)
    change_adapter(start.lm, scale=0.5)
    tokenizer = load_tokenizer(made("llama"))
    save_policy(start, tokenizer, tmp_path / "sft")
    return str(tmp_path / "sft" / "adapter")


@full_or_lora
def test_the_reference_of_a_run_that_starts_from_an_adapter_is_the_sft_model(adapter, policy, monkeypatch, model):
    seen, log = [], policy_stage.Log.step

    def step(self, now, batch, texts, scores, potential, log_a, *rest):
        seen.append((batch.sequences, log_a))
        return log(self, now, batch, texts, scores, potential, log_a, *rest)

    monkeypatch.setattr(policy_stage.Log, "step", step)
    rows = rows_of(policy(adapter, model))
    assert abs(rows[0]["kl_reference"]) <= 1e-4
    assert rows[1]["kl_reference"] > 1e-3, "it has moved"
    whole, base = (Policy(load_causal_lm(x, ModelOptions(""))) for x in (f"{adapter}/../model", made_base(adapter)))
    for sequences, log_a in seen:
        with torch.no_grad():
            assert (whole(sequences).log_probs - log_a).abs().max() <= 1e-4
            assert (base(sequences).log_probs - log_a).abs().max() > 0.1, "the base of the adapter is another model"


def made_base(adapter):
    return json.loads((Path(adapter) / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_an_unmerged_adapter_as_start_is_found(adapter, policy, monkeypatch):
    """Training goes on with the SFT adapter itself, so that adapter off is the base of the SFT model."""

    def unmerged(path, options, value_head, logprob_chunk):
        lm = peft.PeftModel.from_pretrained(load_causal_lm(made_base(path), options), path, is_trainable=True)
        policy = Policy(lm, value_head)
        return policy, Reference(policy, adapter_off=True)

    monkeypatch.setattr(policy_stage, "load_policy", unmerged)
    message = problem(policy, adapter, LORA)
    assert "policy and reference differ" in message
    assert "unmerged adapter" in message


# -- resume ------------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """As a kill: nothing in the library may catch it."""


EVERY_PROMPT = (FULL, "divergence=forward_kl", "policy.num_prompts=12", "policy.max_steps=4")
RESUMED = {
    "tilted": (*EVERY_PROMPT, "policy.warm_start_generations=4", "policy.lr_scheduler_type=cosine"),
    "moments": (*EVERY_PROMPT, "target={name: moments, moments: {praise: .6}, num_prompts: 12}"),
    "dual": (*EVERY_PROMPT, "target={name: moments, moments: {praise: .6}, num_prompts: 12, dual_learning_rate: .5}"),
}


@pytest.fixture(scope="module")
def both(made, data, tmp_path_factory):
    """both(case): the folder of a run that nothing stopped, and that of one stopped after its third update."""

    @functools.cache
    def both(case):
        outputs = tmp_path_factory.mktemp(case)
        raw = tiny.raw_config(made(), data, outputs / "runs")
        raw |= {
            "stages": ["policy"],
            "report_to": "none",
            "scorers": {"praise": {"name": "pattern", "pattern": PATTERN}},
        }
        raw["policy"] |= {"model": made(), "learning_rate": 1e-2}
        raw["target"] = {"name": "tilted", "reward": "praise", "beta": 0.5}
        path = write_config(outputs / "run.yaml", raw)
        whole = run(path, *RESUMED[case], "name=whole").path / "policy"
        logged = policy_stage.Log.step

        def stop(self, now, *rest):
            if now == 3:
                raise Stopped
            return logged(self, now, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy_stage.Log, "step", stop)
            with pytest.raises(Stopped):
                run(path, *RESUMED[case], "name=run")
        return path, whole

    return both


def resumed(both, case, tmp_path, change=lambda folder: None):
    """Goes on with a copy of the stopped run."""
    path, whole = both(case)
    shutil.copytree(whole.parent.parent / "run", tmp_path / "run")
    change(tmp_path / "run" / "policy")
    out = run(path, *RESUMED[case], "name=run", f"output_dir={tmp_path}").path / "policy"
    return out, whole


def after_restore(monkeypatch, change):
    restore = Training.restore

    def wrapped(self):
        step = restore(self)
        return step if change(self) is None else change(self)

    monkeypatch.setattr(Training, "restore", wrapped)


def forget(monkeypatch, what):
    """Puts a resume back in that loses one thing."""
    if what == "reference":
        load, kept = policy_stage.load_policy, {}

        def loaded(*args):
            kept["policy"], kept["reference"] = load(*args)
            return kept["policy"], kept["reference"]

        monkeypatch.setattr(policy_stage, "load_policy", loaded)
        after_restore(
            monkeypatch, lambda training: kept["reference"].policy.load_state_dict(kept["policy"].state_dict()) and None
        )
    if what == "optimiser":
        after_restore(monkeypatch, lambda training: training.optimizer.optimizer.state.clear())
    if what == "schedule":
        monkeypatch.setattr(torch.optim.lr_scheduler.LambdaLR, "load_state_dict", lambda self, state: None)
    if what == "prompts":
        order = policy_stage.row_order
        monkeypatch.setattr(policy_stage, "row_order", lambda seed, step, *rest: order(seed, max(step - 2, 0), *rest))
    if what == "noise":
        noise = policy_rollout.uniforms
        monkeypatch.setattr(policy_rollout, "uniforms", lambda seed, step, *rest: noise(seed, step - 2, *rest))
    if what == "log Z":
        monkeypatch.setattr(LogPartition, "load_state_dict", lambda self, state: None)
    if what == "weights":
        monkeypatch.setattr("accelerate.Accelerator.load_state", lambda *args, **kwargs: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", [None, "reference", "optimiser", "schedule", "prompts", "noise", "log Z", "weights"], ids=str
)
def test_a_resume_that_drops_something_ends_elsewhere(both, tmp_path, monkeypatch, what):
    """And one that drops nothing ends bit for bit where the whole run ended."""
    both("tilted")  # made before anything is put back in, whichever test is the first
    forget(monkeypatch, what)
    out, whole = resumed(both, "tilted", tmp_path)
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3, 4]
    assert rows_of(out)[:2] == rows_of(whole)[:2]
    assert same(weights(out), weights(whole)) == (what is None)
    assert (rows_of(out) == rows_of(whole)) == (what in (None, "schedule")), "the last row is before its update"
    if what == "reference":
        assert rows_of(out)[2]["kl_reference"] < rows_of(whole)[2]["kl_reference"] - 1e-3, "the anchor has moved"
    if what == "log Z":
        assert rows_of(out)[2]["log_z"] != pytest.approx(rows_of(whole)[2]["log_z"], abs=1e-4)


@pytest.mark.slow
def test_a_resume_goes_on_with_the_lambdas_that_were_solved(both, tmp_path):
    """They are read, not solved again; and solved again, from samples of the reference, they would be the same."""
    out, whole = resumed(both, "moments", tmp_path / "kept")
    assert rows_of(out) == rows_of(whole)
    assert same(weights(out), weights(whole))
    solved = json.loads((whole / "target.json").read_text())
    assert abs(solved["lambdas"]["praise"]) > 0.01

    def tamper(folder):
        changed = {**solved, "lambdas": {"praise": 0.0}}
        (folder / "target.json").write_text(json.dumps(changed))

    other, _ = resumed(both, "moments", tmp_path / "tampered", tamper)
    assert rows_of(other) != rows_of(whole)
    again, _ = resumed(both, "moments", tmp_path / "again", lambda folder: (folder / "target.json").unlink())
    assert json.loads((again / "target.json").read_text()) == solved
    assert rows_of(again) == rows_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("forgets", [False, True])
def test_a_resume_goes_on_with_the_lambdas_that_have_followed_the_policy(both, tmp_path, monkeypatch, forgets):
    """Those of the target itself, which evaluation measures against, stay as they were solved."""
    if forgets:
        monkeypatch.setattr(DualAscent, "load_state_dict", lambda self, state: None)
    out, whole = resumed(both, "dual", tmp_path)
    path = [row["lambda_praise"] for row in rows_of(whole)]
    solved = json.loads((whole / "target.json").read_text())["lambdas"]["praise"]
    assert len({solved, *path}) == 5
    assert json.loads((out / "target.json").read_text())["lambdas"]["praise"] == solved
    assert (rows_of(out) == rows_of(whole)) == (not forgets)
    assert same(weights(out), weights(whole)) == (not forgets)


# -- length normalisation ----------------------------------------------------------------------------------------------


@every_f
@every_objective
def test_a_length_normalised_log_prob_is_another_objective(monkeypatch, f, objective):
    assert gradient_error(f, objective, Reinforce()) <= 1e-9
    monkeypatch.setattr(objectives, "sequence_sum", lambda x, mask: (x * mask).sum(-1) / mask.sum(-1))
    assert gradient_error(f, objective, Reinforce()) > 0.05


def test_a_loss_that_averages_over_tokens_is_another_objective(monkeypatch):
    loss = policy_loss

    def averaged(log_probs, old, advantages, mask, clip_range=None):
        return loss(log_probs, old, advantages, mask, clip_range) / mask.sum(-1)

    assert gradient_error(ALL_F[2], Match(), Reinforce()) <= 1e-9
    monkeypatch.setitem(globals(), "policy_loss", averaged)
    assert gradient_error(ALL_F[2], Match(), Reinforce()) > 0.05
