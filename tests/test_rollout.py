"""What is sampled has the distribution that its log-probs are of, for both engines, and depends on its noise alone."""

import copy
import functools

import pytest
import torch
from architectures import SIZES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from toy import (
    ARCHITECTURES,
    EOS,
    INF,
    LENGTH,
    PAD,
    PROMPTS,
    TEXTS,
    TOKENIZER,
    VOCAB,
    N,
    P,
    exact_log_probs,
    language,
    perturbed,
    text_index,
    tiny_lm,
    with_adapter,
)
from transformers import DynamicCache

from rlhf_fdiv.models import Policy
from rlhf_fdiv.rollout import Rollout, _Appending, _in_place, _inverse_cdf, sample, uniforms

ENGINES = ("cached", "generate")
PRECISION = {"cached": 1e-10, "generate": 1e-6}  # generate hands its logits out in float32, whatever the model's dtype
every_engine = pytest.mark.parametrize("engine", ENGINES)
every_lm = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_family = pytest.mark.parametrize("architecture", [*ARCHITECTURES, *sorted(SIZES.keys() - {*ARCHITECTURES})])


def T(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


@functools.cache
def lm_of(architecture):
    """The toy's policy, or a model of another family in float32."""
    return language(architecture)[0].lm if architecture in ARCHITECTURES else tiny_model(architecture, VOCAB)


def precision(lm, engine):
    return 1e-5 if lm.dtype == torch.float32 else PRECISION[engine]


def draw(lm, k, engine="cached", prompts=PROMPTS, seed=0):
    return sample(lm, TOKENIZER, prompts, k, uniforms(seed, 1, len(prompts) * k, LENGTH), engine)


def p_value(drawn, log_pi, k):
    """χ² of the counts of all texts of all prompts, the rare ones (fewer than 5 expected) together."""
    statistic, freedom = 0.0, 0
    for i in range(P):
        rows = slice(i * k, (i + 1) * k)
        counts = torch.bincount(text_index(drawn.completion_ids[rows], drawn.mask[rows]), minlength=N).double()
        expected = k * log_pi[i].exp()
        rare = expected < 5
        cells = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected)]
        observed, wanted = (x[: len(x) if rare.any() else -1] for x in cells)
        statistic += float(((observed - wanted) ** 2 / wanted).sum())
        freedom += len(wanted) - 1
    return stats.chi2.sf(statistic, freedom)


# -- the distribution --------------------------------------------------------------------------------------------------


@every_engine
@every_lm
def test_completions_have_exactly_the_distribution_of_the_policy(engine, architecture):
    policy, _ = language(architecture)
    with torch.no_grad():
        log_pi = exact_log_probs(policy)
    k = 7000
    sequences, *_ = draw(policy.lm, k, engine)
    assert p_value(sequences, log_pi, k) > 1e-4
    other = torch.softmax(1.2 * log_pi, 1).log()  # what a temperature of .83 would give
    assert p_value(sequences, other, k) < 1e-6, "the test has the power to see a wrong temperature"


def test_generate_samples_the_full_distribution_whatever_the_models_own_generation_config_says():
    lm = tiny_lm()
    plain, log_probs, _ = draw(lm, 50, "generate")
    lm.generation_config.update(repetition_penalty=1.5, min_p=0.3, typical_p=0.5, top_k=2, top_p=0.5, temperature=0.1)
    again, log_probs_again, _ = draw(lm, 50, "generate")
    assert torch.equal(again.completion_ids, plain.completion_ids)
    assert torch.equal(log_probs_again, log_probs)


@every_engine
@every_family
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_captured_log_probs_are_those_of_a_fresh_forward(engine, architecture, lora):
    lm = with_adapter(lm_of(architecture)) if lora else lm_of(architecture)
    sequences, log_probs, _ = draw(lm, 40, engine)
    lengths = sequences.mask.sum(1)
    assert set(lengths.tolist()) == {1, 2, 3, 4}, "the case is to hold completions that end early and late"
    assert (sequences.prompt_mask == 0).any()
    with torch.no_grad():
        fresh = Policy(lm)(sequences).log_probs
        if lora:
            with lm.disable_adapter():
                assert (Policy(lm)(sequences).log_probs - fresh).abs().max() > 0.1, "the adapter matters"
    assert torch.allclose(log_probs.double(), fresh.double(), rtol=0, atol=precision(lm, engine))


@every_engine
@every_family
def test_log_probs_and_entropies_are_those_of_each_text_read_alone(engine, architecture):
    lm = lm_of(architecture)
    sequences, log_probs, entropy = draw(lm, 5, engine)
    for i in range(len(sequences)):
        prompt = sequences.prompt_ids[i][sequences.prompt_mask[i] == 1]
        text = sequences.completion_ids[i][sequences.mask[i] == 1]
        with torch.no_grad():
            logits = lm(torch.cat([prompt, text])[None], use_cache=False).logits[0, len(prompt) - 1 : -1].double()
        log_p = logits.log_softmax(-1)
        alone = log_p.gather(1, text[:, None]).squeeze(1), torch.special.entr(log_p.exp()).sum(-1)
        for found, expected in zip((log_probs, entropy), alone, strict=True):
            assert torch.allclose(found[i, : len(text)].double(), expected, rtol=0, atol=precision(lm, engine))
    assert (entropy[sequences.mask == 0] == 0).all()
    assert (log_probs[sequences.mask == 0] == 0).all()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_cache_holds_what_a_plain_one_does_whatever_is_done_to_it(data):
    """Tokens appended, rows repeated and left out in any order, with room for two tokens at a time."""
    plain, ours = DynamicCache(), _in_place(DynamicCache(config=tiny_lm().config))
    assert {type(layer) for layer in ours.layers} == {_Appending}
    for layer in ours.layers:
        layer.room = 2
    rows = data.draw(st.integers(1, 3))
    for i in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["append", "append", "append", "repeat", "select"])) if i else "append"
        if what == "append":
            new = torch.randn(2, rows, 2, data.draw(st.integers(1, 4)), 3)
            for cache in (plain, ours):
                cache.update(*new, 0)
        elif what == "repeat":
            rows *= 2
            plain.batch_repeat_interleave(2)
            ours.layers[0].batch_repeat_interleave(2)
        else:
            keep = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, unique=True)))
            rows = len(keep)
            plain.batch_select_indices(keep)
            ours.layers[0].batch_select_indices(keep)
        held = [(cache.layers[0].keys, cache.layers[0].values) for cache in (plain, ours)]
        assert all(torch.equal(a, b) for a, b in zip(*held, strict=True))
        assert ours.get_seq_length() == plain.get_seq_length()


# -- its noise alone ---------------------------------------------------------------------------------------------------


@every_family
def test_the_same_noise_gives_the_same_completion_whatever_stands_beside_it(architecture):
    lm = lm_of(architecture)
    k = 8
    noise = uniforms(4, 2, P * k, LENGTH)
    together, log_probs, _ = sample(lm, TOKENIZER, PROMPTS, k, noise)
    for i, prompt in enumerate(PROMPTS):
        for j in range(k):
            row = i * k + j
            alone, alone_log_probs, _ = sample(lm, TOKENIZER, [prompt], 1, noise[row : row + 1])
            length = alone.mask.shape[1]
            assert alone.completion_ids[0].tolist() == together.completion_ids[row, :length].tolist()
            assert int(together.mask[row].sum()) == length
            assert torch.allclose(alone_log_probs[0], log_probs[row, :length], rtol=0, atol=precision(lm, "cached"))


@every_engine
def test_the_same_noise_gives_the_same_completions_again_and_other_noise_others(engine):
    policy, _ = language()
    state = torch.random.get_rng_state()
    first, again, other = (draw(policy.lm, 30, engine, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert not torch.equal(first.completion_ids, other.completion_ids)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is left alone"


@every_engine
def test_a_completion_ends_with_its_first_eos_or_is_cut_and_is_never_forced_to_end(engine):
    policy, _ = language()
    sequences, *_ = draw(policy.lm, 200, engine)
    finished = Rollout(sequences, None, None, [0, 1, 2]).finished([EOS])
    for ids, mask, ended in zip(
        sequences.completion_ids.tolist(), sequences.mask.tolist(), finished.tolist(), strict=True
    ):
        length = sum(mask)
        assert mask == [1] * length + [0] * (len(mask) - length)
        assert EOS not in ids[: length - 1]
        assert ended == (ids[length - 1] == EOS)
        assert ended or length == LENGTH
    assert finished.any()
    assert not finished.all()
    lengths, text_mask = sequences.prompt_mask.sum(1), sequences.prompt_ids
    assert lengths.tolist() == [len(p) for p in PROMPTS for _ in range(200)]
    assert text_mask[0].tolist() == [PAD, PAD, 1]


@every_engine
def test_sampling_neither_trains_nor_changes_the_model(engine):
    lm = perturbed(tiny_lm())
    before = copy.deepcopy(lm.state_dict())
    _, log_probs, _ = draw(lm, 2, engine)
    assert not log_probs.requires_grad
    assert all(torch.equal(before[name], weight) for name, weight in lm.state_dict().items())
    assert not lm.training


@every_engine
def test_a_model_that_ends_at_once_gives_texts_of_one_token(engine):
    lm = tiny_lm("gpt2")
    always_eos = torch.nn.Linear(16, 4).double()
    with torch.no_grad():
        always_eos.weight.zero_()
        always_eos.bias.copy_(T(-60.0, -60.0, -60.0, 0.0))
    lm.lm_head = always_eos
    sequences, log_probs, _ = draw(lm, 3, engine)
    assert sequences.completion_ids.tolist() == [[EOS]] * 9
    assert log_probs.abs().max() <= 1e-12


def test_texts_are_decoded_without_what_follows_eos():
    class Decoder:
        def batch_decode(self, rows, skip_special_tokens):
            assert skip_special_tokens
            return ["".join("abc."[t] for t in row if t != EOS) for row in rows]

    policy, _ = language()
    sequences, log_probs, entropy = draw(policy.lm, 20)
    texts = Rollout(sequences, log_probs, entropy, [0, 1, 2]).texts(Decoder())
    expected = [TEXTS[i] for i in text_index(sequences.completion_ids, sequences.mask).tolist()]
    assert texts == ["".join("abc."[t] for t in text if t != EOS) for text in expected]


# -- noise -------------------------------------------------------------------------------------------------------------


def test_uniforms_repeat_differ_by_seed_and_step_and_leave_the_global_state_alone():
    state = torch.random.get_rng_state()
    first = uniforms(3, 5, 40, 7)
    assert torch.equal(first, uniforms(3, 5, 40, 7))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.dtype == torch.float64
    assert not torch.equal(first, uniforms(3, 6, 40, 7))
    assert not torch.equal(first, uniforms(4, 5, 40, 7))
    assert uniforms(0, -12, 2, 2).shape == (2, 2), "the warm start counts its steps below zero"
    assert stats.kstest(uniforms(0, 0, 500, 40).flatten().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_a_completions_noise_does_not_depend_on_the_number_of_processes(processes):
    """As the policy stage slices it: whole prompts to a process, in order."""
    policy, _ = language()
    k, prompts = 4, PROMPTS * 2
    whole = uniforms(0, 1, len(prompts) * k, LENGTH)
    expected = text_index(*(lambda s: (s.completion_ids, s.mask))(sample(policy.lm, TOKENIZER, prompts, k, whole)[0]))
    share, found = len(prompts) // processes, []
    for rank in range(processes):
        mine = slice(rank * share, (rank + 1) * share)
        noise = whole.view(len(prompts), k, -1)[mine].flatten(0, 1)
        part, *_ = sample(policy.lm, TOKENIZER, prompts[mine], k, noise)
        found += text_index(part.completion_ids, part.mask).tolist()
    assert found == expected.tolist()


# -- the inverse distribution function ---------------------------------------------------------------------------------

ALMOST_ONE = 1 - 2.0**-53  # the largest number that torch.rand gives in float64


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.just(-INF), st.floats(-30, 30)), min_size=1, max_size=12).filter(lambda x: max(x) > -INF),
    st.sampled_from([0.0, 5e-324, 2.0**-53, 0.3, 0.999, 1 - 1e-9, ALMOST_ONE]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([(0, 0), (250, 600), (256, 256), (511, 2), (0, 244)]),
)
def test_no_draw_ever_picks_a_token_of_probability_zero(logits, u, dtype, around):
    row = torch.tensor([[-INF] * around[0] + logits + [-INF] * around[1]], dtype=dtype)  # in a block, or over two
    token, log_prob, entropy = _inverse_cdf(row, T(u))
    assert row[0, token] > -INF
    assert float(log_prob) == pytest.approx(float(row.log_softmax(-1)[0, int(token)]), abs=1e-5)
    assert torch.isfinite(entropy).all()
    p = row.double().softmax(-1)[0]
    if u <= 5e-324:
        assert (p[: int(token)] == 0).all()
    if u == ALMOST_ONE:
        assert p[int(token) + 1 :].sum() <= 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_token_of_a_vocabulary_of_50k_is_hit_by_its_own_slice_of_the_unit_interval(dtype):
    vocab = 50_257
    wanted = torch.cat([torch.arange(20), torch.arange(vocab // 2, vocab // 2 + 20), torch.arange(vocab - 20, vocab)])
    logits = torch.zeros(len(wanted), vocab, dtype=dtype)
    for place in (0.001, 0.5, 0.999):
        token, log_prob, entropy = _inverse_cdf(logits, (wanted.double() + place) / vocab)
        assert torch.equal(token, wanted)
    assert log_prob.double() == pytest.approx(-torch.tensor(vocab).double().log().repeat(60), rel=1e-6)
    assert entropy.double() == pytest.approx(torch.tensor(vocab).double().log().repeat(60), rel=1e-5)


def test_the_tail_of_a_50k_vocabulary_is_sampled_as_often_as_it_should_be():
    """A peaked head and 50,000 tokens of 2e-9 each: a cumulative sum in float32 would never move past the head."""
    vocab, tail = 50_001, 1e-4
    logits = torch.full((1, vocab), tail / (vocab - 1), dtype=torch.float64).log()
    logits[0, 0] = torch.tensor(1 - tail).double().log()
    u = 1 - tail * (torch.arange(200).double() + 0.5) / 200
    token, *_ = _inverse_cdf(logits.expand(200, -1), u)
    expected = vocab - (torch.arange(200).double() + 0.5) / 200 * (vocab - 1)
    assert (token - expected).abs().max() <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_is_the_one_whose_slice_holds_u(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 300, generator=generator, dtype=torch.float64).to(dtype)
    u = torch.rand(400, generator=generator, dtype=torch.float64)
    token, *_ = _inverse_cdf(logits, u)
    upper = logits.double().softmax(-1).cumsum(-1)
    lower = torch.cat([torch.zeros(400, 1), upper[:, :-1]], 1)
    assert (lower.gather(1, token[:, None]).squeeze(1) <= u + 1e-6).all()
    assert (u - 1e-6 <= upper.gather(1, token[:, None]).squeeze(1)).all()
