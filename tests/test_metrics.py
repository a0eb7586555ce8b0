"""What is measured on a trained policy: by hand, against exact sums over the toy language, against transformers."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from toy import EOS, N, P, every_architecture, everything, exact_log_probs, language, scores, tiny_lm
from transformers import PreTrainedTokenizerFast

from rlhf_fdiv import divergences
from rlhf_fdiv.metrics import (
    distinct_n,
    likeness,
    log_partition_of,
    measure_all,
    paired_difference,
    perplexity,
    score_both,
    self_bleu,
)
from rlhf_fdiv.models import Policy
from rlhf_fdiv.rollout import Rollout
from rlhf_fdiv.sequences import Sequences, sequence_sum
from rlhf_fdiv.stages.policy_log import Log
from rlhf_fdiv.targets import LogPartition


def T(*values):
    return torch.tensor(values, dtype=torch.float64)


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),  # ab, ba, ab
        (["a b", "b a"], 2, 1.0),
        (["a b", "a b"], 2, 1 / 2),
        (["The film", "the FILM"], 1, 2 / 4),  # case does not make a word new
        (["a", "b"], 2, 0.0),  # no bigram: bigrams do not cross texts
        ([], 1, 0.0),
        (["", "a"], 1, 1.0),
        (["a b c d"], 3, 1.0),
    ],
)
def test_distinct_n_is_distinct_n_grams_over_all_n_grams_of_all_texts(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected)


def test_self_bleu_is_100_for_one_text_repeated_and_0_for_texts_without_a_common_word():
    assert self_bleu(["a very good film indeed"] * 4) == pytest.approx(100)
    assert self_bleu(["a b c d e", "f g h i j"]) < 5
    half = self_bleu(["a b c d", "a b c d", "w x y z", "w x y z"])
    assert half == pytest.approx(100), "each has its copy among the others"
    mixed = self_bleu(["a b c d", "a b c d", "w x y z"])
    assert mixed == pytest.approx(200 / 3, abs=3)


def test_self_bleu_of_fewer_than_two_texts_is_0_and_empty_texts_are_left_out():
    assert self_bleu([]) == self_bleu(["a b c d"]) == self_bleu(["", " "]) == 0
    assert self_bleu(["a b c d", "a b c d", ""]) == pytest.approx(100)


def test_self_bleu_looks_at_the_first_texts_up_to_its_limit():
    assert self_bleu(["a b c d", "a b c d", *(f"x{i} y{i} z{i} w{i}" for i in range(50))], limit=2) == pytest.approx(
        100
    )


def test_an_exact_match_has_bleu_100_and_rouge_1_whichever_reference_it_matches():
    texts = ["a very good film indeed", "so bad that it is good"]
    references = [["no match here at all", texts[0]], [texts[1]]]
    assert likeness(texts, references) == {"bleu": pytest.approx(100), "rouge_l": pytest.approx(1)}


def test_likeness_by_hand():
    found = likeness(["the cat sat"], [["the cat stood up", "a dog"]])
    # longest common subsequence "the cat": precision 2/3, recall 2/4
    assert found["rouge_l"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    nothing = likeness(["x y z w"], [["a b c d"]])
    assert nothing["rouge_l"] == 0
    assert nothing["bleu"] < 5


# -- likelihood --------------------------------------------------------------------------------------------------------

WORDS = ["<pad>", "<eos>", "<unk>", "a", "film", "good", "bad", "very"]
ROWS = [
    {"prompt": "a good film", "completion": "very very good"},
    {"prompt": "bad", "completion": "a"},
    {"prompt": "a very bad film", "completion": "film film bad a a"},
    {"prompt": "very good", "completion": "good unheard"},
    {"prompt": "film", "completion": "bad bad"},
]


def word_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")


@pytest.mark.parametrize(*every_architecture)
@pytest.mark.parametrize("batch_size", [1, 2, 99])
def test_perplexity_is_the_exponential_of_transformers_own_loss_eos_included(architecture, batch_size):
    lm, tokenizer = tiny_lm(architecture, vocab=len(WORDS)), word_tokenizer()
    nats = tokens = 0.0
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + completion])
        with torch.no_grad():
            loss = lm(torch.tensor([prompt + completion]), labels=labels).loss
        nats, tokens = nats + float(loss) * len(completion), tokens + len(completion)
    characters = sum(len(row["completion"]) for row in ROWS)
    found = perplexity(lm, tokenizer, ROWS, batch_size)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert found["bits_per_character"] == pytest.approx(nats / math.log(2) / characters, rel=1e-6)


@pytest.mark.parametrize(*every_architecture)
@pytest.mark.parametrize("batch_size", [50, 363])
def test_score_both_gives_log_probs_and_the_exact_kl_of_the_visited_states(architecture, batch_size):
    policy, reference = language(architecture)
    whole = everything()
    log_pi, log_a, kl = score_both(policy.lm, reference.lm, whole, batch_size)
    with torch.no_grad():
        expected = [exact_log_probs(p) for p in (policy, reference)]
        by_state = torch.zeros(P * N, dtype=torch.float64)
        for i in range(0, P * N, 5):
            prompt = whole.prompt_ids[i][whole.prompt_mask[i] == 1]
            text = whole.completion_ids[i][whole.mask[i] == 1]
            ours, theirs = (
                p.lm(torch.cat([prompt, text])[None]).logits[0].log_softmax(-1) for p in (policy, reference)
            )
            states = divergences.exact(divergences.get("reverse_kl"), ours, theirs)
            by_state[i] = states[len(prompt) - 1 : -1].sum()  # what follows the last token is not visited
    # 1e-5: the figures of a report are computed in float32
    assert torch.allclose(log_pi.view(P, N), expected[0], rtol=0, atol=1e-5)
    assert torch.allclose(log_a.view(P, N), expected[1], rtol=0, atol=1e-5)
    assert torch.allclose(kl[::5], by_state[::5], rtol=0, atol=1e-5)
    # the chain rule: its mean over texts is the KL of the texts
    mean = (expected[0].exp() * kl.view(P, N)).sum(1)
    assert torch.allclose(mean, divergences.exact(divergences.get("reverse_kl"), *expected), rtol=0, atol=1e-5)


def test_the_kl_of_a_model_to_itself_is_zero():
    policy, _ = language()
    *_, kl = score_both(policy.lm, policy.lm, everything()[:20], 7)
    assert kl.abs().max() == 0


# -- log Z and divergences ---------------------------------------------------------------------------------------------


def balanced_draw(k, repeats, potential):
    """log p̃, log π and log a of k texts from the reference and k from the policy of each prompt, over and over,
    [P × repeats, 2k] each, and the exact log Z, [P]."""
    policy, reference = language()
    with torch.no_grad():
        log_pi, log_a = exact_log_probs(policy), exact_log_probs(reference)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.multinomial(x.exp(), k * repeats, replacement=True, generator=generator) for x in (log_a, log_pi)]
    y = torch.cat([x.view(P, repeats, k) for x in draws], 2).flatten(1)
    log_target = log_a + potential
    logs = (x.gather(1, y).view(P * repeats, 2 * k) for x in (log_target, log_pi, log_a))
    return logs, torch.logsumexp(log_target, 1)


@pytest.mark.parametrize("zeros", [False, True], ids=["tilted", "pointwise"])
def test_log_z_from_samples_of_both_models_is_unbiased_for_z_and_low_by_the_stated_bias(zeros):
    potential = scores()["b"].log().view(P, N) if zeros else scores()["reward"].view(P, N)
    repeats, k = 20_000, 8
    logs, exact = balanced_draw(k, repeats, potential)
    found = log_partition_of(*logs)
    log_z = found.log_z.view(P, repeats)
    z = log_z.exp()
    assert ((z.mean(1) - exact.exp()).abs() < 4 * z.std(1) / repeats**0.5).all()
    low = float(exact.mean() - log_z.mean())
    assert low > 10 * float(log_z.std()) / (P * repeats) ** 0.5, "the case is to have a bias that can be seen"
    assert found.bias == pytest.approx(low, rel=0.25)  # half the relative variance is the first order of it
    assert 1 < found.ess < 2 * k


def test_log_z_of_equal_weights_is_exact_with_full_ess_and_no_bias():
    log_pi = log_a = torch.log_softmax(torch.arange(6.0).double(), 0).repeat(2, 1)
    found = log_partition_of(log_a + T(0.7, -30.0)[:, None], log_pi, log_a)
    assert found.log_z.tolist() == pytest.approx([0.7, -30.0])
    assert found.ess == pytest.approx(6)
    assert found.bias == pytest.approx(0, abs=1e-12)


def samples(n, kl, seed=0, groups=50):
    """s = log π − log p ~ N(kl, 2·kl) under π, for which E_π[e^−s] = 1 and KL(π‖p) = kl."""
    s = kl + (2 * kl) ** 0.5 * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.zeros(n).double(), -s, torch.arange(n) % groups


def test_measure_all_gives_each_f_its_value_and_error_under_its_own_name():
    policy, reference = language()
    with torch.no_grad():
        log_pi, log_a = exact_log_probs(policy), exact_log_probs(reference)
    per_prompt, fs = 3000, [divergences.get(n) for n in ("reverse_kl", "js", "tv", "hellinger")]
    y = torch.multinomial(log_pi.exp(), per_prompt, replacement=True, generator=torch.Generator().manual_seed(1))
    groups = torch.arange(P * per_prompt) // 10
    table = measure_all(fs, log_pi.gather(1, y).flatten(), log_a.gather(1, y).flatten(), groups)
    for f in fs:
        row = table[divergences.label(f)]
        exact = float(divergences.exact(f, log_pi, log_a).mean())
        assert abs(row["value"] - exact) < 4 * row["standard_error"]
        assert row["standard_error"] < 0.05
        assert row["reason"] == ""


def test_a_biased_log_z_withholds_a_value_only_where_the_bias_exceeds_the_error():
    fs = [divergences.get("reverse_kl"), divergences.get("alpha", alpha=0.5)]
    logs = samples(4000, 0.2)
    plain, biased = measure_all(fs, *logs), measure_all(fs, *logs, bias=0.5)
    assert measure_all(fs, *logs, bias=0.019) == plain, "a bias of less than .02 nats is nobody's concern"
    for name in plain:
        assert math.isfinite(plain[name]["value"])
        assert math.isnan(biased[name]["value"])
        assert math.isnan(biased[name]["standard_error"])
        assert "biased by about 0.5" in biased[name]["reason"]
    few = samples(40, 0.2)
    error = measure_all(fs, *few)["reverse_kl"]["standard_error"]
    assert measure_all(fs, *few, bias=0.9 * error)["reverse_kl"]["reason"] == ""


def test_a_divergence_with_too_heavy_a_tail_keeps_its_own_reason():
    name = "neyman_chi2"
    row = measure_all([divergences.get(name)], *samples(300, 6.0), bias=9.0)[name]
    assert math.isnan(row["value"])
    assert "tail" in row["reason"] or "averages" in row["reason"]


def test_a_paired_difference_clusters_by_prompt():
    prompt = torch.arange(40) // 4
    effect = torch.randn(10, generator=torch.Generator().manual_seed(0)).double()
    before = torch.randn(40, generator=torch.Generator().manual_seed(1)).double()
    mean, error = paired_difference(before + 3 + effect[prompt], before, prompt)
    assert mean == pytest.approx(3 + float(effect.mean()))
    assert error == pytest.approx(float(effect.std() / 10**0.5)), "10 prompts, not 40 samples, are independent"
    assert paired_difference(before + 1, before, prompt) == (pytest.approx(1), pytest.approx(0, abs=1e-12))


def test_the_policys_sequence_log_probs_and_score_both_say_the_same():
    policy, reference = language("gpt2")
    part = Sequences.of([[1], [2, 0, 1]], [[0, 3], [1, 2, 0, 0]])
    log_pi, log_a, _ = score_both(policy.lm, reference.lm, part, 1)
    with torch.no_grad():
        for found, lm in ((log_pi, policy.lm), (log_a, reference.lm)):
            assert torch.allclose(found, sequence_sum(Policy(lm)(part).log_probs, part.mask), rtol=0, atol=1e-5)


# -- the figures of a policy step --------------------------------------------------------------------------------------


@pytest.fixture
def logged():
    """Figures of one step on 3 prompts × 4 texts under a potential, by the stage's own log."""

    def figures(potential, name="forward_kl"):
        policy, reference = language()
        rows = torch.arange(P)[:, None] * N + torch.tensor([0, 7, 30, 90])
        batch = everything()[rows.flatten()]
        with torch.no_grad():
            log_pi, log_a = policy(batch).log_probs, reference(batch).log_probs
        log_weights = sequence_sum(log_a - log_pi, batch.mask) + potential
        log_z = LogPartition().update([0, 1, 2], log_weights.view(P, 4)).repeat_interleave(4)
        shape = SimpleNamespace(num_generations=4, max_steps=9)
        config = SimpleNamespace(
            policy=shape,
            f=divergences.get(name),
            beta=0.5,
            target=SimpleNamespace(scorers=()),
            report_to="none",
            measured=[divergences.get("js"), divergences.get(name)],
        )
        seen = {}
        training = SimpleNamespace(accelerator=Accelerator(cpu=True), log=lambda step, values, *_: seen.update(values))
        log = Log(config, training, stops=[EOS])
        rollout = Rollout(batch, log_pi, torch.zeros_like(log_pi), [0, 1, 2])
        log.step(1, rollout, {}, {}, potential, log_a, log_z, {}, 1.0)
        return seen, sequence_sum(log_pi, batch.mask), sequence_sum(log_a, batch.mask)

    return figures


def test_a_steps_figures_are_means_over_its_completions(logged):
    potential = torch.linspace(-1, 1, 12, dtype=torch.float64)
    seen, log_pi, log_a = logged(potential, "js")
    kl = float((log_pi - log_a).mean())
    assert seen["kl_reference"] == pytest.approx(kl)
    assert seen["objective"] == pytest.approx(0.5 * (float(potential.mean()) - kl))
    assert seen["out_of_support"] == 0
    assert seen["to_target.js"] == pytest.approx(seen["divergence_target"])
    assert 0 < seen["to_target.js"] < math.log(2)
    assert 0 < seen["finished"] <= 1
    assert 1 <= seen["ess_log_z"] <= 4


def test_a_prompt_none_of_whose_completions_lies_in_the_targets_support_does_not_stop_the_run(logged):
    potential = torch.zeros(12, dtype=torch.float64)
    potential[:4] = -math.inf
    seen, *_ = logged(potential)
    assert seen["out_of_support"] == pytest.approx(1 / 3)
    assert math.isfinite(seen["ess_log_z"])
