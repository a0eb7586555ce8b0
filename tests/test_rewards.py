"""Scorers: each on small input, and every way in which a user's own function can go wrong."""

import asyncio
import json
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from rlhf_fdiv import reward_models
from rlhf_fdiv.config import parse
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.reward_models import is_reward_folder
from rlhf_fdiv.rewards import (
    Function,
    Length,
    NgramRidge,
    Pattern,
    RewardModel,
    Sum,
    Threshold,
    check_scorers,
)
from rlhf_fdiv.rollout import Rollout
from rlhf_fdiv.scoring import Scorers
from rlhf_fdiv.sequences import Sequences
from rlhf_fdiv.stages.policy_rollout import scores_of_prefixes

CPU = torch.device("cpu")
given: list = []  # what a user function below was called with
ANSWERS = {  # what a user function may wrongly give for the completions "c" and "d"
    "too_few": [1.0],
    "too_many": [1.0, 2.0, 3.0],
    "a_number": 3.0,
    "columns": [[1.0], [2.0]],
    "ragged": [[1.0], 2.0],
    "nothing": None,
    "a_nothing": [1.0, None],
    "words": ["a", "b"],
    "digits": ["1", "2"],
    "one_word": "ab",
    "mapping": {"c": 1.0, "d": 2.0},
    "generator": (x for x in (1.0, 2.0)),
    "objects": [object(), object()],
    "object_array": np.array([1.0, "b"], dtype=object),
    "complex": [1j, 2.0],
    "nan": [1.0, math.nan],
    "infinite": [1.0, -math.inf],
    "too_large": [1.0, 1e39],
    "far_too_large": [1.0, 10**400],
}
RIGHT = {
    "floats": [1.5, -2.0],
    "integers": [1, 2],
    "booleans": [True, False],
    "tensor": torch.tensor([1.0, 2.0], dtype=torch.float64),
    "array": np.array([1, 2]),
    "tuple": (1.0, 2.0),
    "numpy_numbers": [np.float32(1), np.float64(2)],
}


def answer(prompts, completions, kind, **columns):
    return (ANSWERS | RIGHT)[kind]


def watched(prompts, completions, **columns):
    given.append((prompts, completions, columns))
    return [float(len(c)) for c in completions]


states: list = []


def few(completions, completion_ids, trainer_state, film):
    states.append(trainer_state)
    return [len(ids) * f for ids, f in zip(completion_ids, film, strict=True)]


async def waits(completions, **columns):
    await asyncio.sleep(30.0 if "sleep" in completions else 0.01)
    if "raise" in completions:
        raise RuntimeError("no")
    if "leave" in completions:
        raise SystemExit(3)
    return [len(c) for c in completions]


def some(completions, **columns):
    return [None if c.startswith("none") else float(c) for c in completions]


def no_function():
    pass


value = 3


def score(spec, completions, prompts=None, **columns):
    prompts = prompts or ["p"] * len(completions)
    return Scorers({"it": spec}, CPU)(["it"], prompts, completions, **columns)["it"]


# built in


def test_pattern_finds_in_any_case_anywhere():
    found = score(Pattern(r"\bact(ing|ors?)\b"), ["The ACTING is", "an actor", "actress", "", "react\nacting"])
    assert found.tolist() == [1, 1, 0, 0, 1]
    assert found.dtype == torch.float32


def test_length_counts_words_over_scale():
    assert score(Length(scale=2.0), ["one two  three\nfour", "", " a "]).tolist() == [2.0, 0.0, 0.5]


def test_no_completions_have_no_scores():
    assert score(Length(), []).shape == (0,)


def test_threshold_is_strictly_above_and_chains():
    specs = {"n": Length(), "long": Threshold("n", above=1.0), "always": Threshold("long", above=-1.0)}
    scores = Scorers(specs, CPU)(["always", "long"], ["p"] * 3, ["a", "a b", ""])
    assert {name: x.tolist() for name, x in scores.items()} == {"always": [1, 1, 1], "long": [0, 1, 0]}
    assert list(scores) == ["always", "long"]


def test_a_threshold_shares_its_scorers_one_evaluation_and_a_scorer_is_opened_once():
    given.clear()
    specs = {"r": Function(f"{__name__}:watched"), "a": Threshold("r", 1.5), "b": Threshold("r", 0.5)}
    scorers = Scorers(specs, CPU)
    scores = scorers(["a", "r", "b"], ["p", "q"], ["c", "dd"])
    assert len(given) == 1
    assert {name: x.tolist() for name, x in scores.items()} == {"a": [0, 1], "r": [1, 2], "b": [1, 1]}
    scorers(["b"], ["p"], ["c"])
    assert len(given) == 2
    assert scorers.names == ["r", "a", "b"]


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    path = tmp_path_factory.mktemp("gold") / "ratings.jsonl"
    rated = {"good fun, great cast": 4, "great and good": 3, "bad, dull, awful": -4, "awful and bad": -3, "a film": 0}
    path.write_text("".join(json.dumps({"text": t, "rating": r}) + "\n" for t, r in rated.items()) * 5)
    return str(path)


def test_ngram_ridge_orders_texts_and_stays_in_its_range(ratings):
    texts = ["good great fun good great", "a film", "bad awful dull bad awful", "", "unseen words"]
    free = score(NgramRidge(ratings, clip=(-99, 99), alpha=1e-3), texts)
    assert free[0] > 2 > free[1] > -2 > free[2]
    clipped = score(NgramRidge(ratings, clip=(-1.0, 1.0), alpha=1e-3), texts)
    assert torch.equal(clipped, free.clamp(-1, 1))
    assert NgramRidge(ratings).clip == (-4, 4)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"text": "a b", "rating": 1}],
        [{"text": "!!", "rating": 1}, {"text": "??", "rating": 2}],
        [{"text": "a b", "rating": math.inf}, {"text": "a b", "rating": 1}],
        [{"txt": "a", "rating": 1}],
    ],
    ids=["no rows", "one row", "no words", "infinite", "no field"],
)
def test_ngram_ridge_that_cannot_be_fitted_names_its_data(tmp_path, rows):
    path = tmp_path / "ratings.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"ratings\.jsonl"):
        score(NgramRidge(str(path)), ["a"])


def classifier(folder, labels: int = 1) -> str:
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({w: i for i, w in enumerate(["<unk>", "<eos>", *"abcdefg"])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    model = LlamaForSequenceClassification(
        LlamaConfig(**shape, num_labels=labels, pad_token_id=1, initializer_range=1.0)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_reward_model_reads_a_sequence_classifier_in_any_batch_size_and_clips(tmp_path):
    path = classifier(tmp_path / "model")
    prompts, completions = ["a", "b c", "a b", "d"], [" b", " a a a a", "", " e f"]
    free = score(RewardModel(path), completions, prompts)
    assert free.std() > 0.01
    one_by_one = score(RewardModel(path, batch_size=1), completions, prompts)
    torch.testing.assert_close(free, one_by_one, rtol=1e-5, atol=1e-6)
    low, high = sorted(free.tolist())[1:3]
    clipped = score(RewardModel(path, clip=(low, high)), completions, prompts)
    torch.testing.assert_close(clipped, free.clamp(low, high))
    assert not is_reward_folder(path)


def test_reward_model_needs_a_model_of_one_label_at_its_path(tmp_path):
    with pytest.raises(UserError, match="path"):
        score(RewardModel(), ["a"])
    with pytest.raises(UserError, match="gone"):
        score(RewardModel(str(tmp_path / "gone")), ["a"])
    with pytest.raises(UserError, match="one label"):
        score(RewardModel(classifier(tmp_path / "two", labels=2)), ["a"])


def test_reward_model_passes_path_batch_size_and_texts_on(monkeypatch):
    calls = []

    class Model:
        def score(self, *args):
            calls.append(args)
            return [-9.0, 0.5]

    monkeypatch.setattr(reward_models, "load_reward_model", lambda path, device: calls.append(path) or Model())
    spec = RewardModel("there", clip=(-4, 4), batch_size=7)
    assert score(spec, ["c", "d"], ["p", "q"], film=["x", "y"]).tolist() == [-4.0, 0.5]
    assert calls == ["there", (["p", "q"], ["c", "d"], 7)]


# a user's function


def test_a_function_gets_prompts_completions_and_extra_columns_by_keyword():
    given.clear()
    film = ["x", "y"]
    assert score(Function(f"{__name__}:watched"), ["c", "dd"], ["p", "q"], film=film).tolist() == [1.0, 2.0]
    assert given == [(["p", "q"], ["c", "dd"], {"film": film})]


def test_a_function_without_columns_gets_what_it_has_parameters_for_and_a_state_that_is_no_column():
    states.clear()
    state = SimpleNamespace(global_step=4)
    spec = Function(f"{__name__}:few", num_workers=2)
    scores = score(spec, ["c", "dd", "e"], film=[1, 2, 3], completion_ids=[[5], [6, 7], [8]], trainer_state=state)
    assert scores.tolist() == [1.0, 4.0, 3.0]
    assert states == [state, state]


def test_a_function_in_c_that_does_not_name_its_parameters_is_called_with_all():
    with pytest.raises(UserError, match="'it' raised TypeError"):
        score(Function("builtins:max"), ["c"])


@pytest.mark.parametrize("workers", [1, 2])
def test_async_functions_are_awaited_and_what_they_raise_names_the_scorer(workers):
    spec = Function(f"{__name__}:waits", num_workers=workers, timeout=60.0)
    assert score(spec, ["c", "dd", "eee"]).tolist() == [1.0, 2.0, 3.0]
    for text, said in (("raise", "no"), ("leave", r"it called exit\(3\)")):
        with pytest.raises(UserError, match=f"'it' raised RuntimeError: {said}"):
            score(spec, [text])
    with pytest.raises(UserError, match=r"no answer within 0\.1 s"):
        score(Function(f"{__name__}:waits", timeout=0.1), ["sleep"])


def test_a_sum_weights_its_parts_and_leaves_out_what_does_not_apply():
    specs = {
        "sum": Sum({"some": 2.0, "length": -0.5, "high": 1.0}),
        "some": Function(f"{__name__}:some"),
        "high": Threshold("some", 1.5),
        "length": Length(),
        "of_sum": Threshold("sum", 1.0),
        "lone": Sum({"some": 1.0}),
    }
    scorers = Scorers(specs, CPU)
    scores = scorers(["sum", "some", "high", "of_sum"], ["p"] * 3, ["1", "none a", "2"])
    assert scores["sum"].tolist() == [2.0 - 0.5 + 0.0, -1.0, 4.0 - 0.5 + 1.0]
    assert scores["of_sum"].tolist() == [1.0, 0.0, 1.0]
    assert scores["some"].isnan().tolist() == scores["high"].isnan().tolist() == [False, True, False]
    alone = Scorers({k: specs[k] for k in ("sum", "some", "length")} | {"over": Threshold("some")}, CPU)
    assert alone(["over"], ["p"] * 3, ["1", "none a", "2"])["over"].isnan().tolist() == [False, True, False]
    for name, among in (("lone", scorers), ("some", Scorers(specs, CPU, targets=["some"]))):
        with pytest.raises(UserError, match=f"'{name}' does not apply to completion 1, 'none a'"):
            among([name], ["p"] * 3, ["1", "none a", "2"])


def test_a_none_and_a_nan_are_two_things():
    scorers = Scorers({"sum": Sum({"mine": 1.0, "n": 1.0}), "mine": Function(f"{__name__}:answer"), "n": Length()}, CPU)
    assert scorers(["sum"], ["p", "q"], ["c", "d"], kind="a_nothing")["sum"].tolist() == [2.0, 1.0]
    with pytest.raises(UserError, match="'mine' gave nan for completion 1"):
        scorers(["sum"], ["p", "q"], ["c", "d"], kind="nan")


@pytest.mark.parametrize("kind", RIGHT)
def test_a_function_may_give_any_sequence_of_numbers(kind):
    expected = [float(x) for x in RIGHT[kind]]
    scores = score(Function(f"{__name__}:answer"), ["c", "d"], kind=kind)
    assert (scores.tolist(), scores.dtype) == (expected, torch.float32)


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_wrong_answer_of_a_function_names_the_scorer(kind):
    scorers = Scorers({"mine": Function(f"{__name__}:answer")}, CPU)
    with pytest.raises(UserError) as caught:
        scorers(["mine"], ["p", "q"], ["c", "d"], kind=kind)
    (message,) = caught.value.problems
    assert "'mine'" in message
    if kind in ("nan", "infinite", "too_large"):
        assert "completion 1: 'd'" in message
    if kind in ("too_few", "too_many"):
        assert "2 completions" in message


def test_a_wrong_answer_under_a_threshold_names_the_scorer_that_gave_it():
    scorers = Scorers({"mine": Function(f"{__name__}:answer"), "t": Threshold("mine")}, CPU)
    with pytest.raises(UserError, match="'mine'"):
        scorers(["t"], ["p", "q"], ["c", "d"], kind="nan")


def test_a_long_completion_is_cut_in_the_message():
    with pytest.raises(UserError) as caught:
        score(Function(f"{__name__}:answer"), ["c", "d" * 10**6], kind="nan")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "path",
    [
        "no_such_module:f",
        f"{__name__}:no_such_function",
        "no_such_package.module:f",
        "json.no_such:f",
        f"{__name__}:value",
    ],
)
def test_a_function_that_is_not_there_is_named(path):
    with pytest.raises(UserError) as caught:
        score(Function(path), ["c"])
    assert path in str(caught.value)


@pytest.mark.parametrize("path", ["os.path.join", "a:b:c", "a b:c", ":f", "a:", "", ".a:f", "a..b:f", "a:.f"])
def test_a_path_that_cannot_be_one_is_an_error_of_the_config(path):
    with pytest.raises(ValueError, match="path"):
        Function(path)


def meet(prompts, completions, film):
    """Returns only if another call is under way at the same time."""
    barrier.wait(timeout=30)
    return [float(c) + f for c, f in zip(completions, film, strict=True)]


def uneven(prompts, completions):
    return [1.0] * (len(completions) + (1 if "0" in completions else -1))


barrier = threading.Barrier(2)


def test_threads_score_parts_at_the_same_time_and_in_order():
    film = [0.25, 0.5, 0.75]
    assert score(Function(f"{__name__}:meet", num_workers=2), ["1", "2", "3"], film=film).tolist() == [1.25, 2.5, 3.75]


def test_a_part_with_a_wrong_count_is_an_error_though_the_whole_has_the_right_one():
    with pytest.raises(UserError, match="3 numbers for 2 completions"):
        score(Function(f"{__name__}:uneven", num_workers=2), ["0", "1", "2", "3"])


def test_a_method_of_a_class_is_reached_by_its_dotted_name():
    assert score(Function(f"{__name__}:Mine.words"), ["a b"]).tolist() == [2.0]


class Mine:
    @staticmethod
    def words(prompts, completions, **columns):
        return [len(c.split()) for c in completions]


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<", "\\"])
def test_an_invalid_pattern_is_an_error_of_the_config_that_names_the_key(pattern):
    raw = {"name": "x", "model": {"name_or_path": "m"}, "scorers": {"p": {"name": "pattern", "pattern": pattern}}}
    with pytest.raises(UserError) as caught:
        parse(raw)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("scorers.p.pattern: ")


# names


def test_check_scorers_names_unknown_ones_of_targets_and_thresholds():
    specs = {"reward": Length(), "t": Threshold("rewards"), "u": Threshold("t")}
    found = check_scorers(specs, ("reward", "rewad"))
    assert len(found) == 2
    assert all("did you mean 'reward'?" in p for p in found)
    assert check_scorers({"reward": Length(), "t": Threshold("reward")}, ("t",)) == []
    for taken, of in (("a_se", "a"), ("a_gain", "a"), ("a_gain_se", "a"), ("objective_gain", "objective")):
        assert f"an error or a gain of '{of}'" in check_scorers({"a": Length(), taken: Length()}, ())[0]
    assert check_scorers({"a": Length(), "b_se": Length()}, ()) == []
    circle = check_scorers({"s": Sum({"t": 1.0, "gone": 1.0}), "t": Threshold("s"), "u": Threshold("t")}, ())
    assert [p.split(":")[0] for p in circle] == ["scorers.s.of", "scorers.s.of", "scorers.t.of"]
    assert "'gone' is not another scorer" in circle[1]


@pytest.mark.parametrize("of", [{}, {"reward": "x"}, {"reward": math.inf}, ["reward"]])
def test_a_sum_is_of_names_and_numbers(of):
    raw = {
        "name": "x",
        "model": "m",
        "stages": ["evaluate"],
        "scorers": {"reward": "length", "s": {"name": "sum", "of": of}},
    }
    with pytest.raises(UserError, match=r"scorers\.s\.of"):
        parse(raw | {"model": {"name_or_path": "m"}, "data": {"prompts_eval": "p"}})


def words_so_far(prompts, completions, completion_ids, year, trainer_state, **columns):
    given.append([*zip(prompts, completions, completion_ids, year, strict=True)])
    return [len(c.split()) + trainer_state.global_step for c in completions]


def test_prefixes_are_scored_as_completions_are_with_all_columns_of_theirs():
    """Before each token, EOS too, what stood there; nothing for padding, which need not be scored."""
    words = tiny.tokenizer()
    rows = [
        [words.convert_tokens_to_ids(w) for w in text.split()] for text in ("the plot is <eos>", "good", "a cast <eos>")
    ]
    sequences = Sequences.of([[5]] * 3, rows)
    zeros = torch.zeros(sequences.mask.shape)
    columns = {"prompts": ["p", "p", "q"], "completions": ["the plot is", "good", "a cast"], "completion_ids": rows,
               "year": [1, 1, 2], "trainer_state": SimpleNamespace(global_step=10)}  # fmt: skip
    scorers = Scorers({"n": Function(f"{__name__}:words_so_far"), "two": Threshold("n", 11.5)}, CPU)
    given.clear()
    batch = Rollout(sequences, zeros, zeros, [0, 1])
    found = scores_of_prefixes(scorers, ["n", "two"], batch, columns, words)
    assert found["n"].tolist() == [[10, 11, 12, 13], [10, 0, 0, 0], [10, 11, 12, 0]]
    assert found["two"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    (seen,) = given
    assert seen[2:6] == [
        ("p", "the plot", rows[0][:2], 1),
        ("p", "the plot is", rows[0][:3], 1),
        ("p", "", [], 1),
        ("q", "", [], 2),
    ]
    assert scores_of_prefixes(scorers, [], batch, columns, words) == {}
