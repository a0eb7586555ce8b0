"""A reward model of the policy's vocabulary has read every prefix of a completion once it has read the completion."""

from dataclasses import dataclass

import pytest
import tiny
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from transformers.models.t5gemma import T5GemmaConfig, T5GemmaForSequenceClassification
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

from rlhf_fdiv import reward_models
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.reward_models import HeadReward, HiddenStates, Judge, load_reward_model
from rlhf_fdiv.rewards import RewardModel, Threshold
from rlhf_fdiv.rollout import Rollout
from rlhf_fdiv.scoring import Scorers
from rlhf_fdiv.sequences import Sequences
from rlhf_fdiv.stages.policy_rollout import scores_of_prefixes

CPU = torch.device("cpu")
PROMPTS = ["film : one review :", "film : two three four review :", "film : five review :"]
TEXTS = ["the plot is very good <eos>", "a", "dull and weak <eos>"]
SHARED = {"vocab_size": len(tiny.WORDS), "num_labels": 1, "pad_token_id": 0, "initializer_range": 0.3}
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CLASSIFIERS = {
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SHARED)),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, **SHARED)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, **SHARED)),
    "gemma that looks both ways": lambda: Gemma3TextForSequenceClassification(
        Gemma3TextConfig(use_bidirectional_attention=True, **GEMMA, **SHARED)
    ),
    "encoder of t5gemma": lambda: t5gemma(False),
    "t5gemma": lambda: t5gemma(True),
}
GEMMA = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 1, "bos_token_id": 1}


def t5gemma(whole):
    part = T5GemmaModuleConfig(**GEMMA, **SHARED)
    config = T5GemmaConfig(
        encoder=part, decoder=part, is_encoder_decoder=whole, eos_token_id=1, bos_token_id=1, **SHARED
    )
    return T5GemmaForSequenceClassification(config, is_encoder_decoder=whole)


def ids(texts, words):
    return [words.convert_tokens_to_ids(text.split()) for text in texts]


def classifier(folder, architecture, more_words=()):
    torch.manual_seed(0)
    CLASSIFIERS[architecture]().save_pretrained(folder)
    words = tiny.tokenizer()
    words.add_tokens([*more_words])
    words.save_pretrained(folder)
    return str(folder)


def head(folder):
    states = HiddenStates(tiny.model_folder(folder / "backbone"), "float32", [0.5, 1.0], CPU)
    torch.manual_seed(0)
    reward = HeadReward(states, {"backbone": str(folder / "backbone"), "dtype": "float32", "layers": [0.5, 1.0]},
                        torch.randn(64), torch.randn(64), torch.rand(64) + 0.5)  # fmt: skip
    reward.save(folder / "head")
    return reward, str(folder / "head")


def found(spec):
    """[3, 6], what the scorer says before each token, through the function that the policy stage calls."""
    words = tiny.tokenizer()
    rows = ids(TEXTS, words)
    sequences = Sequences.of(ids(PROMPTS, words), rows)
    zeros = torch.zeros(sequences.mask.shape)
    columns = {
        "prompts": PROMPTS,
        "completions": words.batch_decode(rows, skip_special_tokens=True),
        "completion_ids": rows,
    }
    specs = {"reward": spec, "high": Threshold("reward", 0.1)}
    scores = scores_of_prefixes(
        Scorers(specs, CPU), [*specs], Rollout(sequences, zeros, zeros, [0, 1, 2]), columns, words
    )
    assert torch.equal(scores["high"], (scores["reward"] > 0.1).float() * sequences.mask)
    return scores["reward"]


def one_by_one(of_prefix):
    """The same by `of_prefix(prompt ids, prefix ids)` for each of them."""
    words, out = tiny.tokenizer(), torch.zeros(3, 6)
    for i, (prompt, row) in enumerate(zip(ids(PROMPTS, words), ids(TEXTS, words), strict=True)):
        out[i, : len(row)] = torch.tensor([of_prefix(prompt, row[:t]) for t in range(len(row))])
    return out


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_causal_classifier_says_of_a_prefix_what_it_says_of_it_alone(tmp_path, architecture, batch_size):
    path = classifier(tmp_path, architecture)
    model = load_reward_model(path, CPU).model
    with torch.no_grad():
        alone = one_by_one(lambda prompt, prefix: float(model(input_ids=torch.tensor([[*prompt, *prefix]])).logits))
    assert alone.std() > 0.1
    torch.testing.assert_close(found(RewardModel(path, batch_size=batch_size)), alone, rtol=1e-5, atol=1e-5)
    low, high = alone.quantile(torch.tensor([0.3, 0.7])).tolist()
    clipped = found(RewardModel(path, clip=(low, high)))
    torch.testing.assert_close(clipped[alone != 0], alone[alone != 0].clamp(low, high), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_head_scores_the_mean_of_the_tokens_so_far_and_0_before_the_first(tmp_path, batch_size):
    reward, path = head(tmp_path)

    @torch.no_grad()
    def of_prefix(prompt, prefix):
        if not prefix:
            return 0.0
        hidden = reward.states.model(torch.tensor([[*prompt, *prefix]]), output_hidden_states=True).hidden_states
        features = torch.cat([hidden[layer][0, len(prompt) :].mean(0) for layer in (1, 2)])
        return float(((features - reward.mean) / reward.std) @ reward.weight)

    alone = one_by_one(of_prefix)
    assert alone.std() > 0.1
    torch.testing.assert_close(found(RewardModel(path, batch_size=batch_size)), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [("llama", ["six"]), *((name,) for name in [*CLASSIFIERS][2:])], ids=str)
def test_other_models_score_each_prefix_as_a_text(tmp_path, model):
    """Another vocabulary has other tokens; what reads both ways would have read what follows."""
    path, words = classifier(tmp_path, *model), tiny.tokenizer()
    judge = load_reward_model(path, CPU)

    def as_text(prompt, prefix):
        return judge.score([words.decode(prompt)], [words.decode(prefix)], 1)[0]

    alone = one_by_one(as_text)
    assert alone.std() > 0.01
    torch.testing.assert_close(found(RewardModel(path, batch_size=1)), alone, rtol=1e-4, atol=1e-4)


def test_a_token_that_the_model_has_no_row_for_changes_nothing_elsewhere(tmp_path):
    """The policy's vocabulary may be padded further than the reward model's."""
    judge, words = Judge(classifier(tmp_path, "llama"), CPU, 4), tiny.tokenizer()
    alone = judge.of_prefixes(words, PROMPTS[:1], [[5, 6, 7]])
    beside = judge.of_prefixes(words, PROMPTS[:2], [[5, 6, 7], [5, len(words), 99]])
    assert beside[:3] == pytest.approx(alone, abs=1e-5)
    assert len(beside) == 6


def test_a_prompt_without_tokens_has_nothing_before_the_first(tmp_path, monkeypatch):
    judge, words = Judge(classifier(tmp_path, "llama"), CPU, 4), tiny.tokenizer()
    monkeypatch.setattr(reward_models, "encode_prompts", lambda prompts, tokenizer: [[] for _ in prompts])
    first, *others = judge.of_prefixes(words, [""], [[5, 6, 7]])
    assert first == 0
    model = judge.model.model
    with torch.no_grad():
        alone = [float(model(input_ids=torch.tensor([row])).logits) for row in ([5], [5, 6])]
    assert others == pytest.approx(alone, abs=1e-5)


@dataclass(frozen=True)
class Lengths:
    """A scorer of a user's own that can tell of every token at once."""

    too_few: bool = False

    def open(self, device):
        return Counting(self.too_few)


class Counting:
    def __init__(self, too_few):
        self.too_few = too_few

    def __call__(self, prompts, completions, **columns):
        raise AssertionError("it was asked once a token")

    def of_prefixes(self, tokenizer, prompts, token_ids):
        assert (len(tokenizer), prompts) == (len(tiny.WORDS), PROMPTS)
        prompts.clear()  # what it changes is its own
        return [float(t) for row in token_ids for t in range(len(row) - self.too_few)]


def test_a_scorer_of_ones_own_is_asked_once_and_checked_like_any_other():
    assert found(Lengths()).tolist() == [[0, 1, 2, 3, 4, 5], [0] * 6, [0, 1, 2, 3, 0, 0]]
    with pytest.raises(
        UserError, match=r"scorer 'reward' gave shape \[8\] for 11 completions\n.*unfinished completions"
    ):
        found(Lengths(too_few=True))
