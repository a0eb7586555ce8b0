"""Policy, reference and what is written to disk: the ordinary Hugging Face folder that it must be."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from architectures import SIZES, tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from toy import (
    ARCHITECTURES,
    LENGTH,
    PROMPTS,
    TOKENIZER,
    change_adapter,
    everything,
    tiny_lm,
    trainable,
)
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.activations import NewGELUActivation

from rlhf_fdiv.errors import UserError
from rlhf_fdiv.model_options import LoraOptions, ModelOptions
from rlhf_fdiv.models import (
    Policy,
    Reference,
    context_length,
    in_micro_batches,
    load_causal_lm,
    load_policy,
    load_tokenizer,
    require_plain_head,
    save_policy,
)
from rlhf_fdiv.rollout import Rollout, sample, uniforms
from rlhf_fdiv.sequences import Sequences, pad, token_log_probs
from rlhf_fdiv.stages.policy import self_check

every_lm = pytest.mark.parametrize("architecture", ARCHITECTURES)
LORA = LoraOptions(r=2, lora_alpha=4)
WORDS = ["<pad>", "<eos>", "<unk>", "a", "film", "good", "bad", "very"]
FULL_OR_LORA = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])


def tiny_tokenizer(**special):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def saved(folder, architecture="llama", dropout=0.0, **special):
    """A model folder as a user has one, in float32; its 8 words include the toy's 4 tokens."""
    lm = tiny_lm(architecture, dropout=dropout, vocab=len(WORDS)).float()
    lm.save_pretrained(folder)
    tiny_tokenizer(**(special or {"eos_token": "<eos>", "pad_token": "<pad>"})).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp(request.param) / "start", request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama") / "start")


def options(folder, lora=None, dtype="float64"):
    return ModelOptions(folder, dtype=dtype, lora=lora)


def log_probs(policy_or_lm, sequences=None):
    policy = policy_or_lm if isinstance(policy_or_lm, Policy) else Policy(policy_or_lm)
    with torch.no_grad():
        return policy(everything()[torch.arange(0, 363, 3)] if sequences is None else sequences).log_probs


def move(policy, seed=5):
    """As training would: the adapter where there is one, else every weight."""
    if hasattr(policy.lm, "disable_adapter"):
        change_adapter(policy.lm, seed=seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in trainable(policy):
                weight += 0.05 * torch.randn(weight.shape, generator=generator).to(weight.dtype)


# -- the reference -----------------------------------------------------------------------------------------------------


@FULL_OR_LORA
def test_the_reference_is_the_untouched_base_before_and_after_the_policy_has_moved(folder, lora):
    base = log_probs(load_causal_lm(folder, options(folder)))
    policy, reference = load_policy(folder, options(folder, lora))
    batch = everything()[torch.arange(0, 363, 3)]
    assert torch.equal(log_probs(policy), base), "the policy starts at its reference, exactly"
    for seed in (1, 2):
        move(policy, seed)
        assert (log_probs(policy) - base).abs().max() > 0.1
        assert torch.equal(reference.log_probs(batch), base)
    assert (log_probs(policy) - base).abs().max() > 0.1, "the adapter is on again after the reference was asked"
    assert not reference.log_probs(batch).requires_grad


@FULL_OR_LORA
def test_what_can_be_trained_is_the_policy_and_never_the_reference(llama, lora):
    policy, reference = load_policy(llama, options(llama, lora), value_head=True)
    names = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert {"value_head.weight", "value_head.bias"} < names
    body = {n for n in names if not n.startswith("value_head")}
    everything_else = {n for n, _ in policy.named_parameters() if not n.startswith("value_head")}
    assert body == ({n for n in everything_else if "lora_" in n} if lora else everything_else)
    reference.log_probs(everything()[:3])
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == names
    if lora is None:
        assert not trainable(reference.policy)
        mine = {p.data_ptr() for p in policy.parameters()}
        assert mine.isdisjoint(p.data_ptr() for p in reference.policy.parameters())


@FULL_OR_LORA
def test_a_training_step_moves_the_policy_and_not_its_reference(llama, lora):
    policy, reference = load_policy(llama, options(llama, lora))
    batch = everything()[:40]
    before = reference.log_probs(batch)
    optimizer = torch.optim.SGD(trainable(policy), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        policy(batch).log_probs.sum().backward()
        optimizer.step()
    assert torch.equal(reference.log_probs(batch), before)
    assert (log_probs(policy, batch) - before).abs().max() > 1e-3


@FULL_OR_LORA
def test_the_reference_can_be_sampled_from(llama, lora):
    policy, reference = load_policy(llama, options(llama, lora))
    move(policy)
    noise = uniforms(0, 0, 30, LENGTH)
    with reference.lm() as lm:
        drawn, captured, _ = sample(lm, TOKENIZER, PROMPTS, 10, noise)
    assert torch.allclose(captured.double(), reference.log_probs(drawn), rtol=0, atol=1e-5)
    assert (log_probs(policy, drawn) - captured).abs().max() > 0.1


def test_lora_weights_stay_float32_on_a_bfloat16_model(llama):
    policy, _ = load_policy(llama, options(llama, LORA, "bfloat16"))
    assert {p.dtype for p in trainable(policy)} == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert log_probs(policy).dtype == torch.float32


# -- the value head ----------------------------------------------------------------------------------------------------


def whole(lm, sequences):
    """log π by one plain forward over prompt and completion, which shares nothing between rows."""
    length = sequences.mask.shape[1]
    logits = lm(**sequences.model_inputs(), use_cache=False).logits[:, -length - 1 : -1]
    return token_log_probs(logits, sequences.completion_ids, sequences.mask)


PROMPT_LENGTHS = {"mixed": [5, 5, 2, 5, 1, 2], "one token each": [1] * 6, "all different": [1, 2, 3, 4, 5, 6]}


@pytest.mark.parametrize(
    ("architecture", "lengths"),
    [(x, "mixed") for x in SIZES]
    + [(x, n) for x in ("gpt2", "llama", "mistral") for n in PROMPT_LENGTHS if n != "mixed"],
)
@FULL_OR_LORA
def test_prompts_read_once_for_all_their_completions_change_neither_log_probs_nor_gradients(
    architecture, lengths, lora
):
    # eager attention, the only one with soft caps, rounds to float32, where float64's mask of padding is -inf
    dtype = torch.float32 if architecture == "gemma2" else torch.float64
    lm = tiny_model(architecture, vocab=8).to(dtype)
    if lora:
        lm = get_peft_model(lm, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).to(dtype)
        change_adapter(lm, seed=1)
    prompts = [[(3 + i) % 8 for i in range(n)] for n in PROMPT_LENGTHS[lengths]]
    texts = [[2, 5, 1], [4], [3, 1], [6, 6, 6, 6], [1], [7, 2, 3, 4]]
    sequences = Sequences(*pad(prompts, 0, "left"), *pad(texts, 0, "right"))
    gradients = []
    for log_pi in (whole(lm, sequences), Policy(lm)(sequences).log_probs):
        lm.zero_grad()
        (log_pi * torch.arange(1.0, 25.0).view(6, 4)).sum().backward()
        gradients.append((log_pi.detach(), *(p.grad for p in trainable(lm) if p.grad is not None)))
    for once, together in zip(*gradients, strict=True):
        if architecture in ("gpt2", "opt"):
            torch.testing.assert_close(together, once, rtol=1e-10, atol=1e-12)
        else:  # whose norms are in float32, whatever the model is: a sum of gradients is rounded there once or five times
            near = 3e-7 if dtype == torch.float64 else 3e-6
            torch.testing.assert_close(together, once, rtol=1e-5, atol=near * float(once.abs().max()))


def test_a_prompt_goes_through_the_model_once_however_many_completions_it_has():
    lm, read = tiny_lm("llama"), []
    lm.model.register_forward_pre_hook(
        lambda m, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompts, texts = [[3, 2, 3]] * 5 + [[2, 2, 3]] * 5, [[2, 1]] * 10
    Policy(lm)(Sequences(*pad(prompts, 0, "left"), *pad(texts, 0, "right")))
    assert read == [2 * 2, 10 * 2]  # two prompts but for their last token; that token and what predicts, ten times


@every_lm
def test_values_are_those_of_the_state_before_each_token_and_zero_at_padding(architecture):
    lm = tiny_lm(architecture)
    policy = Policy(lm, value_head=True).double()
    torch.nn.init.normal_(policy.value_head.weight)
    whole = everything()[torch.arange(0, 363, 11)]
    with torch.no_grad():
        out = policy(whole)
        assert (out.values[whole.mask == 0] == 0).all()
        assert torch.equal(out.log_probs, Policy(lm)(whole).log_probs)
        for i in range(len(whole)):
            prompt = whole.prompt_ids[i][whole.prompt_mask[i] == 1]
            text = whole.completion_ids[i][whole.mask[i] == 1]
            hidden = lm(torch.cat([prompt, text])[None], output_hidden_states=True).hidden_states[-1][0]
            expected = policy.value_head(hidden[len(prompt) - 1 : -1]).squeeze(-1)
            assert torch.allclose(out.values[i, : len(text)], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 5, 33, 100])
def test_micro_batches_of_any_size_give_every_row_its_own_log_probs_and_values(size):
    policy = Policy(tiny_lm("gpt2"), value_head=True).double()
    torch.nn.init.normal_(policy.value_head.weight)
    batch = everything()[torch.arange(0, 363, 11)]
    texts = (F.pad(x, (0, 2)) for x in (batch.completion_ids, batch.mask))  # wider than any row needs
    loose = Sequences(batch.prompt_ids, batch.prompt_mask, *texts)
    seen: list[weakref.ref] = []

    def watched(part):
        assert all(logits() is None for logits in seen), "the logits of one micro-batch are gone before the next"
        out = policy(part)
        seen.append(weakref.ref(out.logits))
        return out

    out, expected = in_micro_batches(watched, loose, size), policy(loose)
    assert not out.log_probs.requires_grad
    torch.testing.assert_close(out[:2], expected[:2], rtol=0, atol=1e-12)
    reference = Reference(policy, adapter_off=False)
    torch.testing.assert_close(reference.log_probs(loose, size), out.log_probs, rtol=0, atol=0)


def test_a_new_value_head_says_zero_and_there_is_none_unless_asked_for():
    policy = Policy(tiny_lm(), value_head=True).double()
    assert (policy(everything()[:5]).values == 0).all()
    assert Policy(tiny_lm())(everything()[:5]).values is None


# -- logits by chunks --------------------------------------------------------------------------------------------------


@FULL_OR_LORA
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_chunks_change_neither_log_probs_nor_values_nor_gradients(folder, lora, chunk):
    def both(**kwargs):
        torch.manual_seed(0)
        policy, reference = load_policy(folder, options(folder, lora), value_head=True, **kwargs)
        torch.nn.init.normal_(policy.value_head.weight)
        move(policy)
        batch = everything()[torch.arange(0, 363, 3)]
        out = policy.double()(batch)
        weight = torch.randn(out.log_probs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        ((out.log_probs + out.values) * weight).sum().backward()
        return out, reference.log_probs(batch), [p.grad for p in trainable(policy) if p.grad is not None]

    (plain, log_a, gradients), (ours, our_log_a, our_gradients) = both(), both(logprob_chunk=chunk)
    assert ours.logits is None
    assert torch.allclose(ours.log_probs, plain.log_probs, rtol=0, atol=1e-12)
    assert torch.allclose(ours.values, plain.values, rtol=0, atol=1e-12)
    assert torch.allclose(our_log_a, log_a, rtol=0, atol=1e-12)
    assert len(our_gradients) == len(gradients) > 2
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(our_gradients, gradients, strict=True))


def test_chunks_are_refused_where_the_head_is_not_all_that_makes_the_logits(llama):
    lm = load_causal_lm(llama, options(llama))
    require_plain_head(lm)
    config = Gemma2Config(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                          num_key_value_heads=1, head_dim=8, final_logit_softcapping=30.0)  # fmt: skip
    with pytest.raises(UserError, match=r"logprob_chunk: .*soft cap"):
        require_plain_head(Gemma2ForCausalLM(config).eval())


# -- disk --------------------------------------------------------------------------------------------------------------


@FULL_OR_LORA
def test_what_is_saved_is_an_ordinary_model_equal_to_the_policy(folder, lora, tmp_path):
    policy, _ = load_policy(folder, options(folder, lora, "float32"), value_head=True)
    move(policy)
    torch.nn.init.ones_(policy.value_head.weight)
    expected = log_probs(policy)
    save_policy(policy, load_tokenizer(folder), tmp_path)
    assert torch.equal(log_probs(policy), expected), "saving does not change the policy"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert (log_probs(model) - expected).abs().max() <= 1e-5
    assert (tmp_path / "adapter" / "adapter_config.json").is_file() == (lora is not None)
    assert (tmp_path / "value_head.safetensors").is_file()
    again, reference = load_policy(str(tmp_path / "model"), options(str(tmp_path / "model"), lora, "float32"))
    assert (log_probs(again) - expected).abs().max() <= 1e-5
    assert torch.equal(log_probs(again), reference.log_probs(everything()[torch.arange(0, 363, 3)]))


def test_a_saved_policy_generates_text_in_a_pipeline(llama, tmp_path):
    policy, _ = load_policy(llama, options(llama, LORA, "float32"))
    move(policy)
    save_policy(policy, load_tokenizer(llama), tmp_path)
    assert load_tokenizer(str(tmp_path / "model")).get_vocab() == {word: i for i, word in enumerate(WORDS)}
    generate = pipeline("text-generation", model=str(tmp_path / "model"))
    (out,) = generate("a very good film", max_new_tokens=5, do_sample=False)
    assert out["generated_text"].startswith("a very good film")


def test_a_saved_adapter_on_its_base_is_the_policy(folder, tmp_path):
    policy, _ = load_policy(folder, options(folder, LORA, "float32"))
    move(policy)
    save_policy(policy, load_tokenizer(folder), tmp_path)
    merged = load_causal_lm(str(tmp_path / "adapter"), options("", dtype="float32"))
    assert (log_probs(merged) - log_probs(policy)).abs().max() <= 1e-5


@pytest.fixture
def trained_adapter(llama, tmp_path):
    """The folder of an SFT model that is itself an adapter, and its log-probs."""
    policy, _ = load_policy(llama, options(llama, LORA, "float32"))
    move(policy)
    save_policy(policy, load_tokenizer(llama), tmp_path / "sft")
    return str(tmp_path / "sft" / "adapter"), log_probs(policy)


@FULL_OR_LORA
def test_an_adapter_as_start_is_merged_first_so_that_adapter_off_is_the_start_not_its_base(
    llama, trained_adapter, lora
):
    adapter, start = trained_adapter
    assert (start - log_probs(load_causal_lm(llama, options(llama)))).abs().max() > 0.1
    policy, reference = load_policy(adapter, options(adapter, lora, "float32"))
    batch = everything()[torch.arange(0, 363, 3)]
    assert (log_probs(policy) - start).abs().max() <= 1e-5
    move(policy, seed=8)
    assert (reference.log_probs(batch) - start).abs().max() <= 1e-5


def test_an_adapter_folder_is_a_start_for_everything_that_the_stages_read_from_it(trained_adapter):
    adapter, _ = trained_adapter
    assert load_tokenizer(adapter).eos_token == "<eos>"
    assert context_length(adapter) == 32


def test_the_adapter_of_a_policy_that_started_from_an_adapter_is_not_saved_on_the_wrong_base(trained_adapter, tmp_path):
    """`adapter/` names the base that it belongs to; on the first base alone it would be another model."""
    adapter, _ = trained_adapter
    policy, _ = load_policy(adapter, options(adapter, LORA, "float32"))
    move(policy, seed=8)
    save_policy(policy, load_tokenizer(adapter), tmp_path / "rl")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "rl" / "model").eval()
    assert (log_probs(whole) - log_probs(policy)).abs().max() <= 1e-5
    merged = load_causal_lm(str(tmp_path / "rl" / "adapter"), options("", dtype="float32"))
    assert (log_probs(merged) - log_probs(policy)).abs().max() <= 1e-5


# -- tokenizers and configs --------------------------------------------------------------------------------------------


def test_a_tokenizer_without_eos_is_refused_with_the_reason(tmp_path):
    tiny_tokenizer(pad_token="<pad>").save_pretrained(tmp_path)
    tiny_lm(vocab=len(WORDS)).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no EOS token"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_pads_on_the_left_and_falls_back_to_eos_for_want_of_a_pad(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, eos_token="<eos>"))
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_the_context_length_is_read_from_the_config(folder):
    assert context_length(folder) == 32


# -- dropout and the self-check ----------------------------------------------------------------------------------------


def drawn(policy, k=10, engine="cached"):
    noise = uniforms(0, 0, len(PROMPTS) * k, LENGTH)
    return Rollout(*sample(policy.lm, TOKENIZER, PROMPTS, k, noise, engine), [0, 1, 2])


@FULL_OR_LORA
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("engine", ["cached", "generate"])
def test_a_config_with_dropout_gives_a_ratio_of_exactly_one(architecture, lora, engine, tmp_path):
    folder = saved(tmp_path, architecture, dropout=0.5)
    policy, reference = load_policy(folder, options(folder, lora))
    batch = drawn(policy, engine=engine)
    once, twice = policy(batch.sequences).log_probs, policy(batch.sequences).log_probs
    assert torch.equal(once, twice)
    assert torch.equal(once, reference.log_probs(batch.sequences))
    assert torch.allclose(once.detach().float(), batch.log_probs.float(), rtol=0, atol=1e-5)
    self_check(policy, reference, batch)


def test_a_policy_made_of_a_model_in_training_mode_has_its_dropout_off():
    policy = Policy(tiny_lm("gpt2", dropout=0.5).train())
    assert torch.equal(log_probs(policy), log_probs(policy))


@FULL_OR_LORA
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_self_check_passes_on_a_sound_policy(folder, lora, dtype):
    policy, reference = load_policy(folder, options(folder, lora, dtype), value_head=True)
    self_check(policy, reference, drawn(policy))


@FULL_OR_LORA
def test_the_self_check_finds_dropout(lora, tmp_path):
    folder = saved(tmp_path, "gpt2", dropout=0.5)
    policy, reference = load_policy(folder, options(folder, lora))
    batch = drawn(policy)
    policy.train()
    with pytest.raises(UserError, match=r"(?i)dropout"):
        self_check(policy, reference, batch)


def test_the_self_check_finds_positions_that_ignore_left_padding(monkeypatch, tmp_path):
    folder = saved(tmp_path, "gpt2")
    policy, reference = load_policy(folder, options(folder))
    batch = drawn(policy)
    sound = Sequences.model_inputs
    monkeypatch.setattr(
        Sequences, "model_inputs", lambda self: {k: v for k, v in sound(self).items() if k != "position_ids"}
    )
    with pytest.raises(UserError, match="positions under left padding"):
        self_check(policy, reference, batch)


@FULL_OR_LORA
def test_the_self_check_finds_a_reference_that_is_not_the_start(llama, lora):
    policy, reference = load_policy(llama, options(llama, lora))
    move(policy)
    with pytest.raises(UserError, match=r"policy and reference differ.*adapter"):
        self_check(policy, reference, drawn(policy))


def test_the_self_check_finds_a_truncated_sampler(llama):
    """Log-probs of a rollout at temperature .5, scored at 1: what a wrongly set engine would hand over."""
    policy, reference = load_policy(llama, options(llama))
    batch = drawn(policy)
    cold = copy.deepcopy(policy)
    with torch.no_grad():
        cold.lm.lm_head.weight *= 2
    batch.log_probs = log_probs(cold, batch.sequences)
    with pytest.raises(UserError, match="truncated sampler"):
        self_check(policy, reference, batch)


@pytest.mark.parametrize("whose", ["policy", "reference"])
def test_the_self_check_does_not_let_nan_pass(llama, whose):
    policy, reference = load_policy(llama, options(llama))
    batch = drawn(policy)
    with torch.no_grad():
        (policy if whose == "policy" else reference.policy).lm.lm_head.weight[0] = float("nan")
    with pytest.raises(UserError):
        self_check(policy, reference, batch)


def test_the_fused_gelu_is_the_models_own_function(tmp_path):
    folder = saved(tmp_path / "start", "gpt2")
    ours = load_causal_lm(folder, options(folder, dtype="float32"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert not any(isinstance(m, NewGELUActivation) for m in ours.modules())
    assert any(isinstance(m, NewGELUActivation) for m in theirs.modules())
    assert (log_probs(ours) - log_probs(theirs)).abs().max() <= 1e-5
    assert ours.config.activation_function == "gelu_new"
