"""Layout of a batch: masks, padding on either side, token log-probs, and that none of them depends on the neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import EOS, INF, PAD, PROMPTS, TEXTS, every_architecture, everything, language

from rlhf_fdiv.sequences import Sequences, at_last_token, pad, sequence_sum, token_log_probs

quick = settings(max_examples=40, deadline=None, derandomize=True)
rows_of_ids = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5)


def random_logits(*shape, seed=0, dtype=torch.float64):
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@quick
@given(rows_of_ids, st.sampled_from(["left", "right"]))
def test_pad_keeps_every_token_on_its_side_whatever_the_padding_value(rows, side):
    ids, mask = pad(rows, 7, side)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert [i[m.bool()].tolist() for i, m in zip(ids, mask, strict=True)] == rows
    assert (ids[mask == 0] == 7).all()
    steps = mask.diff(dim=1)
    assert (steps >= 0).all() if side == "left" else (steps <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_log_probs_are_log_softmax_then_gather_in_float32_or_wider_and_zero_where_masked(dtype):
    logits = random_logits(3, 5, 11, dtype=torch.float64).to(dtype)
    tokens = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))
    _, mask = pad([[0] * 5, [0] * 2, [0]], 0, "right")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.log_softmax(logits.to(wide), -1).gather(-1, tokens[..., None]).squeeze(-1) * mask
    found = token_log_probs(logits, tokens, mask)
    assert found.dtype == wide
    assert torch.allclose(found, expected, rtol=0, atol=1e-13 if dtype == torch.float64 else 1e-5)
    assert (found[mask == 0] == 0).all()


@quick
@given(rows_of_ids)
def test_a_masked_sum_is_the_sum_of_the_unpadded_rows_never_a_mean(rows):
    values, mask = pad(rows, 99, "right")
    assert sequence_sum(values, mask).tolist() == [sum(row) for row in rows]


@quick
@given(rows_of_ids)
def test_a_score_is_paid_once_at_the_last_token_and_never_on_padding(rows):
    _, mask = pad(rows, 0, "right")
    score = torch.arange(1.0, len(rows) + 1)
    paid = at_last_token(score, mask)
    assert (paid[mask == 0] == 0).all()
    assert [int(r.nonzero()) for r in paid] == [len(row) - 1 for row in rows]
    assert torch.equal(paid.sum(1), score)


def test_a_score_is_paid_at_eos_and_where_there_is_none_at_the_last_token_though_padding_looks_like_text():
    whole = everything()
    paid = at_last_token(torch.ones(len(whole)), whole.mask).nonzero()[:, 1]
    ended = (whole.completion_ids == EOS).any(1)
    assert torch.equal(paid[ended], (whole.completion_ids == EOS).long().argmax(1)[ended])
    assert (paid[~ended] == whole.mask.shape[1] - 1).all()
    assert (whole.completion_ids[whole.mask == 1] == PAD).any(), "the padding token also occurs as an ordinary token"


def test_a_padded_position_gets_no_gradient():
    logits = random_logits(2, 4, 5).requires_grad_()
    _, mask = pad([[0] * 4, [0] * 2], 0, "right")
    token_log_probs(logits, torch.zeros(2, 4, dtype=torch.long), mask).sum().backward()
    assert (logits.grad[mask == 0] == 0).all()
    assert (logits.grad[mask == 1] != 0).all()


@pytest.mark.parametrize(*every_architecture)
def test_a_text_scored_alone_equals_the_same_text_in_a_padded_batch(architecture):
    policy, _ = language(architecture)
    prompts = [p for p in PROMPTS for _ in range(4)]
    texts = [TEXTS[0], TEXTS[2], TEXTS[8], TEXTS[-1]] * 3
    with torch.no_grad():
        together = policy(Sequences.of(prompts, texts)).log_probs
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            alone = policy(Sequences.of([prompt], [text])).log_probs[0]
            assert torch.allclose(together[row, : len(text)], alone, rtol=0, atol=1e-10)
            assert (together[row, len(text) :] == 0).all()


@pytest.mark.parametrize(*every_architecture)
def test_what_stands_in_the_padding_does_not_matter(architecture):
    policy, _ = language(architecture)
    whole = everything()
    other = Sequences(
        torch.where(whole.prompt_mask == 1, whole.prompt_ids, 2),
        whole.prompt_mask,
        torch.where(whole.mask == 1, whole.completion_ids, EOS),
        whole.mask,
    )
    with torch.no_grad():
        assert torch.allclose(policy(whole).log_probs, policy(other).log_probs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(*every_architecture)
@pytest.mark.parametrize(
    "rows", [torch.tensor([3]), torch.tensor([300, 5, 5, 122]), slice(121, 130), torch.arange(363) % 40 == 0]
)
def test_selected_rows_lose_others_padding_and_keep_their_log_probs(rows, architecture):
    policy, _ = language(architecture)
    whole = everything()
    part = whole[rows]
    with torch.no_grad():
        expected, found = policy(whole).log_probs[rows], policy(part).log_probs
    length = part.mask.shape[1]
    assert torch.allclose(found, expected[:, :length], rtol=0, atol=1e-12)
    assert (expected[:, length:] == 0).all()
    assert part.prompt_mask.any(0).all(), "a column of padding alone remains"
    assert part.mask.any(0).all()
    assert len(part) == len(whole.mask[rows])


def test_positions_count_tokens_from_zero_through_left_padding():
    inputs = Sequences.of([[1], [2, 0, 1]], [[1, EOS], [0, 0]]).model_inputs()
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert inputs["input_ids"].tolist() == [[0, 0, 1, 1, EOS], [2, 0, 1, 0, 0]]


def test_ids_and_masks_of_different_shape_are_refused():
    ids, mask = pad([[1, 2]], 0, "left")
    with pytest.raises(ValueError, match="shape"):
        Sequences(ids, mask[:, :1], ids, mask)


def test_an_impossible_token_has_log_prob_minus_infinity_not_nan():
    logits = torch.tensor([[[0.0, -INF]]])
    assert token_log_probs(logits, torch.tensor([[1]]), torch.ones(1, 1)).tolist() == [[-INF]]


def test_padding_that_the_model_finds_impossible_still_counts_zero_in_value_and_gradient():
    logits = torch.tensor([[[0.0, 1.0, -INF], [0.0, 1.0, -INF]]], requires_grad=True)  # token 2 pads
    log_probs = token_log_probs(logits, torch.tensor([[1, 2]]), torch.tensor([[1, 0]]))
    assert log_probs[0, 1] == 0
    assert torch.autograd.grad(log_probs.sum(), logits)[0].isfinite().all()
