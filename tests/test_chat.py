"""Prompts of messages: the same tokens in every stage, the same end of a turn learned and stopped at, and clear refusals."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch
from architectures import tiny_model
from tiny import WORDS, jsonl, problems, raw_config, run, write_config, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from toy import LENGTH, PROMPTS, VOCAB, tiny_lm
from transformers import GenerationConfig, PreTrainedTokenizerFast

from rlhf_fdiv import config as configs
from rlhf_fdiv import metrics
from rlhf_fdiv.chat import encode_prompts, encode_whole, end_of_turn, shown, stop_ids
from rlhf_fdiv.data import COMPLETIONS, PREFERENCES, read_rows, tokenize_completions, tokenize_prompts
from rlhf_fdiv.data import PROMPTS as PROMPT_ROWS
from rlhf_fdiv.models import Policy, load_tokenizer
from rlhf_fdiv.reward_models import load_reward_model
from rlhf_fdiv.rewards import Function, Length, Pattern
from rlhf_fdiv.rollout import Rollout, sample, uniforms
from rlhf_fdiv.scoring import Scorers
from rlhf_fdiv.sequences import Sequences, sequence_sum
from rlhf_fdiv.stages import prefer, sft
from rlhf_fdiv.stages.common import check_inputs

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ROLES = ["system", "user", "assistant", "model"]
# base Qwen: its EOS ends documents, its template ends turns, and its generation config knows the first alone; Gemma's knows
# both, and its tokenizer writes BOS before text as its template does
STYLES = {
    "qwen3": (CHATML, ["<|im_start|>", "<|im_end|>"], 1),
    "gemma3_text": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], [1, len(WORDS) + len(ROLES) + 2]),
}
BOS, END = len(WORDS) + len(ROLES), len(WORDS) + len(ROLES) + 2
every_style = pytest.mark.parametrize("style", STYLES)
TURNS = [
    {"role": "user", "content": "film : one"},
    {"role": "assistant", "content": "a good cast"},
    {"role": "user", "content": "review : plot"},
]


def chat_tokenizer(style, template=True):
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS + ROLES)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    text, turns, _ = STYLES[style]
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>", bos_token="<bos>",
        extra_special_tokens=turns, chat_template=text if template else None,
    )  # fmt: skip
    if style == "gemma3_text":
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return made


def chat_folder(folder, style, template=True):
    lm, tokenizer = tiny_model(style, END + 1), chat_tokenizer(style, template)
    lm.generation_config.eos_token_id = STYLES[style][2]
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=STYLES)
def style(request):
    return request.param


@pytest.fixture(scope="module")
def start(style, tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp(style) / "start", style)


@pytest.fixture(scope="module")
def chat_data(tmp_path_factory):
    """The rows of tiny.data_files as conversations of one, two or three turns, with completions as text or as messages."""
    folder = tmp_path_factory.mktemp("chat")
    data = tiny.data_files(folder)
    for key in data.keys() - {"gold"}:
        rows = jsonl(folder / f"{key}.jsonl")
        for i, row in enumerate(rows):
            row["prompt"] = (TURNS[:2] if i % 3 == 0 else []) + [{"role": "user", "content": row["prompt"]}]
            for part in row.keys() & {"completion", "chosen", "rejected"}:
                row[part] = row[part].strip()
                if i % 2:
                    row[part] = [{"role": "assistant", "content": row[part]}]
        write_rows(folder / f"{key}.jsonl", rows)
    return data


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_the_tokens_of_a_prompt_are_those_of_the_template_without_a_second_bos(start, style):
    tokenizer = load_tokenizer(start)
    (ids,) = encode_prompts([TURNS], tokenizer)
    open_, end = END - 1, END
    user, model = (WORDS + ROLES).index("user"), (WORDS + ROLES).index("assistant" if style == "qwen3" else "model")

    def words(text):
        return [WORDS.index(word) for word in text.split()]

    expected = [open_, user, *words("film : one"), end, open_, model, *words("a good cast"), end, open_, user,
                *words("review : plot"), end, open_, model]  # fmt: skip
    assert ids == ([BOS] if style == "gemma3_text" else []) + expected
    (text,) = encode_prompts(["a good film"], tokenizer)
    assert text == ([BOS] if style == "gemma3_text" else []) + words("a good film")


def test_a_turn_ends_with_the_templates_token_and_a_text_with_eos(start):
    tokenizer = load_tokenizer(start)
    assert (end_of_turn(tokenizer), tokenizer.eos_token_id) == (END, 1)
    assert stop_ids(tokenizer) == [1, END]
    for prompt, end in ((TURNS, END), ("film : one", 1)):
        (ids,) = tokenize_completions([prompt], ["a good cast"], tokenizer, 9)
        assert ids == [*tokenizer("a good cast", add_special_tokens=False)["input_ids"], end]
    assert tokenize_completions([TURNS], ["a good cast"], tokenizer, 2)[0][-1] != END, "a cut text has no end"


def test_what_a_completion_is_trained_on_is_how_the_template_writes_the_whole_conversation(start):
    """All of it, but for what stands behind the end of the turn."""
    tokenizer = load_tokenizer(start)
    (prompt,), (completion,) = (
        encode_prompts([TURNS], tokenizer),
        tokenize_completions([TURNS], ["is great"], tokenizer, 9),
    )
    (whole,) = encode_whole([TURNS], ["is great"], tokenizer)
    assert whole[: len(prompt + completion)] == prompt + completion


def test_sft_and_prefer_train_on_the_very_tokens_that_a_rollout_would_give(start, chat_data, tmp_path, monkeypatch):
    tokenizer, seen = load_tokenizer(start), []
    monkeypatch.setattr(sft.DivergenceSFTTrainer, "train", lambda self, **k: seen.append(self.train_dataset))
    path = write_config(tmp_path / "chat.yaml", raw_config(start, chat_data, tmp_path / "runs"))
    run(path, "stages=[sft]")
    rows = read_rows(chat_data["sft_train"], COMPLETIONS)
    expected = [
        (x, y)
        for x, y in zip(tokenize_prompts(rows, tokenizer, "", 60),
                        tokenize_completions([r["prompt"] for r in rows], [r["completion"] for r in rows], tokenizer, 60),
                        strict=True)
    ]  # fmt: skip
    assert [row["input_ids"] for row in seen[0]] == [x + y for x, y in expected]
    assert [row["labels"] for row in seen[0]] == [[-100] * len(x) + y for x, y in expected]
    pairs = read_rows(chat_data["preferences_train"], PREFERENCES)
    prompt, chosen, rejected = prefer.tokenize_pairs(pairs, tokenizer, "", 9, 64)[3]
    assert prompt == encode_prompts([pairs[3]["prompt"]], tokenizer)[0]
    assert chosen[-1] == rejected[-1] == END
    assert tokenizer.decode(chosen, skip_special_tokens=True) == pairs[3]["chosen"]


# -- several tokens that end a completion ------------------------------------------------------------------------------

TWO = SimpleNamespace(eos_token_id=3, pad_token_id=2, stop_ids=[3, 2])  # one of them pads, as in Qwen's instruct models


@pytest.mark.parametrize("engine", ["cached", "generate"])
def test_a_rollout_stops_at_the_first_of_several_ends_and_its_language_has_mass_one(engine):
    lm = tiny_lm()
    texts = metrics.all_texts(VOCAB, stop_ids(TWO), LENGTH)
    whole = Sequences.of([PROMPTS[1]] * len(texts), texts)
    with torch.no_grad():
        log_pi = sequence_sum(Policy(lm)(whole).log_probs, whole.mask)
    assert abs(float(log_pi.exp().sum()) - 1) < 1e-12
    drawn, log_probs, _ = sample(lm, TWO, [PROMPTS[1]], 4000, uniforms(0, 1, 4000, LENGTH), engine)
    place = {tuple(text): i for i, text in enumerate(texts)}
    rows = [place[tuple(ids[keep.bool()].tolist())] for ids, keep in zip(drawn.completion_ids, drawn.mask, strict=True)]
    assert torch.allclose(sequence_sum(log_probs, drawn.mask).double(), log_pi[rows], rtol=0, atol=1e-5)
    share = torch.bincount(torch.tensor(rows), minlength=len(texts)) / 4000
    error = (log_pi.exp() * (1 - log_pi.exp()) / 4000).sqrt()
    assert ((share - log_pi.exp()).abs() <= 5 * error + 1 / 4000).all()
    finished = Rollout(drawn, log_probs, log_probs, [0]).finished(stop_ids(TWO))
    assert torch.equal(finished, torch.tensor([texts[i][-1] in (2, 3) for i in rows]))


def test_an_id_of_the_generation_config_that_is_an_ordinary_word_ends_nothing(tmp_path):
    lm = tiny_model("llama", len(WORDS))
    lm.generation_config.eos_token_id = 2 + WORDS.index("film")
    lm.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert stop_ids(load_tokenizer(str(tmp_path))) == [1]


# -- scorers -----------------------------------------------------------------------------------------------------------

CALLS = []


def recorded(prompts, completions, **columns):
    CALLS.append((prompts, completions, columns))
    return [float(len(x[0]["content"]) if isinstance(x, list) else len(x)) for x in completions]


def test_a_function_gets_messages_as_trl_gives_them_and_the_others_text():
    specs = {"own": Function("test_chat:recorded"), "words": Length(), "praise": Pattern("good")}
    scores = Scorers(specs, torch.device("cpu"))(
        [*specs], prompts=[TURNS, TURNS], completions=["a good cast", "dull"], film=[1, 2]
    )
    assert CALLS.pop() == (
        [TURNS] * 2,
        [[{"role": "assistant", "content": x}] for x in ("a good cast", "dull")],
        {"film": [1, 2]},
    )
    assert {k: v.tolist() for k, v in scores.items()} == {"own": [11, 4], "words": [3, 1], "praise": [1, 0]}
    Scorers(specs, torch.device("cpu"))(["own"], prompts=["a"], completions=["dull"])
    assert CALLS.pop()[:2] == (["a"], ["dull"])


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_stage_takes_messages_and_the_model_learns_to_end_its_turn(start, chat_data, tmp_path):
    raw = raw_config(start, chat_data, tmp_path / "runs")
    path = write_config(tmp_path / "chat.yaml", raw)
    folder = run(path, "sft.max_steps=40", "evaluate.num_generations=8")
    out = folder.stage("policy") / "model"
    assert GenerationConfig.from_pretrained(out).eos_token_id == [1, END]
    report = json.loads((folder.stage("evaluate") / "metrics.json").read_text())
    assert report["sft"]["perplexity"] < 6
    rows = tiny.completions(folder.stage("policy"))
    assert set(rows["prompts"]) <= {shown(r["prompt"]) for r in read_rows(chat_data["prompts_train"], PROMPT_ROWS)}
    table = pd.read_parquet(folder.stage("evaluate") / "samples.parquet")
    assert table["prompt"].str.contains("user: film : ").all()
    assert not table["sft"].str.contains("<").any()
    assert "user: film : one review : " in (folder.path / "report.md").read_text()
    assert jsonl(folder.stage("policy") / "metrics.jsonl")[-1]["finished"] > 0.8


@pytest.mark.slow
def test_a_fine_tuned_reward_model_scores_the_tokens_that_it_was_trained_on(start, chat_data, tmp_path, monkeypatch):
    from trl import RewardTrainer

    seen = []
    monkeypatch.setattr(RewardTrainer, "train", lambda self, **k: seen.append(self.train_dataset))
    path = write_config(tmp_path / "chat.yaml", raw_config(start, chat_data, tmp_path / "runs"))
    folder = run(path, "stages=[reward]", "reward={method: finetune, max_steps: 1, max_length: 64}")
    model = load_reward_model(str(folder.stage("reward") / "model"), torch.device("cpu"))
    rows = read_rows(chat_data["preferences_train"], PREFERENCES)
    scored = []
    model.model.register_forward_pre_hook(
        lambda m, a, k: scored.append(k["input_ids"][k["attention_mask"].bool()]), with_kwargs=True
    )
    for row, trained in zip(rows[:6], seen[0], strict=False):
        model.score([row["prompt"]], [row["chosen"]], 1)
        assert scored.pop().tolist() == trained["chosen_ids"]
        template = model.tokenizer.apply_chat_template(
            [*row["prompt"], {"role": "assistant", "content": row["chosen"]}]
        )
        assert template["input_ids"] == trained["chosen_ids"]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_template_is_told_with_the_mend_before_any_model_loads(tmp_path, chat_data):
    start = chat_folder(tmp_path / "start", "qwen3", template=False)
    path = write_config(tmp_path / "chat.yaml", raw_config(start, chat_data, tmp_path / "runs"))
    for stage, key in (("sft", "sft_train"), ("reward", "preferences_train"), ("policy", "prompts_train")):
        told = problems(check_inputs, configs.load(path), [stage])
        assert told[0].startswith(f"{chat_data[key]}: the prompts are messages")
        assert "set tokenizer.chat_template" in told[0]


def test_messages_that_the_template_refuses_are_told_by_row(tmp_path):
    tokenizer = load_tokenizer(chat_folder(tmp_path / "start", "gemma3_text"))
    rows = [{"prompt": TURNS}, {"prompt": [{"role": "system", "content": "very dull"}, *TURNS]}]
    (told,) = problems(tokenize_prompts, rows, tokenizer, "a.jsonl", 60)
    assert told.startswith("a.jsonl: row 2: ")
    assert "System role not supported" in told


USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": []}, "field 'prompt' is empty"),
        ({"prompt": ["a"]}, "field 'prompt', message 1: must be like"),
        ({"prompt": [USER, {"role": "user"}]}, "field 'prompt', message 2: must be like"),
        ({"prompt": [{"role": "usr", "content": "a"}]}, "message 1: role 'usr' is none of system, developer, user,"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1: its content must be text, not list"),
        ({"prompt": [{"role": "user", "content": " "}]}, "message 1: its content is empty"),
        ({"prompt": [USER, ANSWER]}, "message 2: a prompt ends with what is to be answered"),
        ({"completion": [USER]}, "field 'completion' must be text or one message of the assistant"),
        ({"completion": [USER, ANSWER]}, "field 'completion' must be text or one message of the assistant"),
        ({"completion": []}, "field 'completion' is empty"),
        ({"prompt": "a"}, "its prompt is text and those before are not; a file holds one kind"),
    ],
)  # fmt: skip
def test_a_wrong_message_is_told_by_row(tmp_path, row, said):
    good = {"prompt": [USER], "completion": [ANSWER]}
    source = write_rows(tmp_path / "a.jsonl", [good, good | row])
    (told,) = problems(read_rows, source, COMPLETIONS)
    assert told.startswith(f"{source}, row 2: ")
    assert said in told


def test_what_is_right_is_read_with_completions_as_text(tmp_path):
    messages = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "tool")]
    source = write_rows(
        tmp_path / "a.jsonl", [{"prompt": messages, "completion": [ANSWER]}, {"prompt": [USER], "completion": "c"}]
    )
    assert read_rows(source, COMPLETIONS) == [
        {"prompt": messages, "completion": "b"},
        {"prompt": [USER], "completion": "c"},
    ]
