"""`align` from Python: the same run as from the command line, TRL's reward functions in full, and f inside TRL's trainers."""

import asyncio
import copy
import functools
import json
import re
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers.normalizers import Lowercase
from toy import perturbed
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.rewards import get_soft_overlong_punishment

import rlhf_fdiv
from rlhf_fdiv import align, assets, divergences, library, metrics
from rlhf_fdiv.estimators import RLOO
from rlhf_fdiv.functions import required_columns
from rlhf_fdiv.model_options import LoraOptions
from rlhf_fdiv.models import Policy, load_tokenizer
from rlhf_fdiv.objectives import Distil, Prefer, Regularise, token_rewards
from rlhf_fdiv.sequences import Sequences, pad, sequence_sum
from rlhf_fdiv.stages.prefer import collate, tokenize_pairs

POLICY = {"max_steps": 3, "num_prompts": 4, "num_generations": 4, "max_completion_length": 6, "learning_rate": 1e-2}
PAGE = Path(__file__).parent.parent / "docs" / "library.md"


def praise(prompts, completions, worth=1.0, **columns):
    return [worth * float(bool(re.search(tiny.PATTERN, c))) for c in completions]


class Half(divergences.family.ReverseKL):
    """Not registered, and known by its path alone."""

    name = "half"


@pytest.fixture
def small(start, data, tmp_path):
    """align() with a model in memory, a dataset in memory and three short steps; keywords go over that."""
    lm = AutoModelForCausalLM.from_pretrained(start)
    rows = Dataset.from_list(tiny.jsonl(Path(data["prompts_train"])))

    def call(reward_funcs=praise, model=lm, train_dataset=rows, **options):
        options = {"output_dir": tmp_path / "mine", "report_to": "none", "policy": POLICY, "beta": 0.5} | options
        return align(model, reward_funcs, train_dataset, **options)

    return call


# the run


@pytest.mark.slow
def test_the_same_settings_give_the_same_weights_as_the_command_line(small, start, data, tmp_path, call):
    made = small(divergence="js", eval_dataset=data["prompts_eval"], evaluate={"num_generations": 2})
    raw = {
        "stages": ["policy", "evaluate"],
        "output_dir": str(tmp_path),
        "report_to": "none",
        "model": start,
        "data": {"prompts_train": data["prompts_train"], "prompts_eval": data["prompts_eval"]},
        "scorers": {"praise": {"name": "function", "path": f"{__name__}:praise"}},
        "target": {"name": "tilted", "reward": "praise", "beta": 0.5},
        "divergence": "js",
        "policy": POLICY,
        "evaluate": {"num_generations": 2},
    }
    assert call("run", tiny.write_config(tmp_path / "other.yaml", raw))[0] == 0
    other = tmp_path / "other"
    assert tiny.same(tiny.weights(made.path / "policy" / "model"), tiny.weights(other / "policy" / "model"))
    rows = [tiny.without_time(tiny.jsonl(path / "policy" / "metrics.jsonl")) for path in (made.path, other)]
    assert rows[0] == rows[1]
    measured = [json.loads((path / "evaluate" / "metrics.json").read_text()) for path in (made.path, other)]
    assert measured[0] == measured[1]
    assert len(made.metrics) == 3
    assert made.metrics["praise"].tolist() == [row["praise"] for row in rows[1]]
    assert tiny.same({k: made.model.state_dict()[k] for k in tiny.weights(other / "policy" / "model")},
                     tiny.weights(other / "policy" / "model"))  # fmt: skip
    assert made.processing_class.get_vocab() == load_tokenizer(start).get_vocab()
    # what align wrote is a config that the command line runs
    code, said, _ = call("run", str(made.path / "resolved_config.yaml"))
    assert (code, said.count("finished before, skipped")) == (0, 2)


@pytest.mark.slow
def test_a_second_call_is_the_same_run_and_another_is_told_what_differs(small, start, tmp_path, capsys):
    lm = AutoModelForCausalLM.from_pretrained(start)
    before = copy.deepcopy(lm.state_dict())
    made = small(model=lm)
    assert tiny.same(before, lm.state_dict())
    assert not tiny.same(before, made.model.state_dict())
    capsys.readouterr()
    small(model=lm)
    assert "policy: finished before, skipped" in capsys.readouterr().out
    files = sorted(tmp_path.rglob("*"))
    lm.lm_head.weight.data[0, 0] += 1e-6
    assert "model.name_or_path" in tiny.problems(functools.partial(small, model=lm))[0]
    rows = Dataset.from_list([{"prompt": "film : one review :"}])
    assert "data.prompts_train" in tiny.problems(functools.partial(small, train_dataset=rows))[0]
    assert "divergence" in tiny.problems(functools.partial(small, divergence="js"))[0]
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_its_checkpoint(small):
    calls = []

    def stops(completions, **columns):
        calls.append(len(completions))
        if len(calls) == 3:
            raise RuntimeError("stopped")
        return [len(c) / 9 for c in completions]

    policy = POLICY | {"save_steps": 1}
    assert "stopped" in tiny.problems(functools.partial(small, stops, policy=policy))[0]
    resumed = small(stops, policy=policy)
    assert len(calls) == 4  # two steps, the one that failed, and only that one again
    whole = small(stops, policy=policy, output_dir=resumed.path.with_name("whole"))
    assert tiny.same(resumed.model.state_dict(), whole.model.state_dict())


def test_what_a_peft_config_has_beyond_ours_is_refused(small):
    (message,) = tiny.problems(functools.partial(small, peft_config=LoraConfig(lora_dropout=0.1, use_rslora=True)))
    assert "lora_dropout, use_rslora cannot be set" in message
    assert library._lora(LoraConfig()) == {"r": 8, "lora_alpha": 8, "target_modules": None}
    assert library._lora({"r": 3}) == {"r": 3}


@pytest.mark.slow
def test_an_adapter_trains_by_config_and_one_in_memory_is_merged(small, start, tmp_path):
    made = small(peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert json.loads((made.path / "policy" / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert made.config.model.lora == LoraOptions(2, 4, ["q_proj", "v_proj"])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(start), LoraConfig(r=2, init_lora_weights=False))
    merged = copy.deepcopy(adapted).merge_and_unload().state_dict()
    made = small(model=adapted, processing_class=load_tokenizer(start), output_dir=tmp_path / "second")
    (kept,) = (made.path / "given").glob("model-*")
    assert tiny.same({k: merged[k] for k in tiny.weights(kept)}, tiny.weights(kept))
    assert made.config.model.lora is None


def test_what_a_tokenizer_or_model_in_memory_was_changed_in_is_another_run(small, start):
    lm, words = AutoModelForCausalLM.from_pretrained(start), load_tokenizer(start)
    made = small(model=lm, processing_class=words)
    words(
        ["a", "b c"], padding=True, truncation=True, max_length=2
    )  # which the tokenizer remembers, and changes no result
    assert small(model=lm, processing_class=words).path == made.path
    lm.generation_config.eos_token_id = [1, 2]
    assert "another config" in tiny.problems(functools.partial(small, model=lm, processing_class=words))[0]
    lm, other = AutoModelForCausalLM.from_pretrained(start), load_tokenizer(start)
    other.backend_tokenizer.normalizer = Lowercase()
    assert "another config" in tiny.problems(functools.partial(small, model=lm, processing_class=other))[0]
    lm.config._name_or_path = ""
    assert tiny.problems(functools.partial(small, model=lm))[0].startswith(
        "processing_class: is required, since the LlamaForCausalLM in memory"
    )


def test_a_model_section_takes_a_tokenizer_too(small, start):
    words = load_tokenizer(start)
    words.chat_template = "{{ messages[0].content }}"
    made = small(model={"name_or_path": start, "dtype": "float64"}, processing_class=words)
    assert made.processing_class.chat_template == words.chat_template
    assert made.config.model.dtype == "float64"


@pytest.mark.parametrize("f", [
    divergences.get("js", unit_curvature=True), Half(), divergences.get("alpha", alpha=0.3),
    divergences.get("mixture", components=["js", {"name": "alpha", "alpha": 2}], weights=[0.5, 1.0]),
], ids=divergences.label)  # fmt: skip
def test_an_f_in_memory_stands_in_the_config_as_what_makes_it_again(f):
    spec = divergences.spec_of(f)
    assert divergences.get(yaml.safe_load(yaml.safe_dump(spec))) == f


def test_an_f_that_no_config_can_name_is_an_error(small):
    (message,) = tiny.problems(functools.partial(small, divergence=divergences.Scaled(divergences.get("js"), 3.0)))
    assert message.startswith("divergence: 3·js: a config can scale an f by 1/f''(1) alone")


def test_a_divergence_in_memory_and_a_model_by_name_with_another_tokenizer(small, start):
    f, tokenizer = divergences.get("alpha", alpha=0.3), load_tokenizer(start)
    tokenizer.chat_template = "{{ messages[0].content }}"
    made = small(model=start, processing_class=tokenizer, divergence=f)
    assert made.config.divergence == {"name": "alpha", "alpha": 0.3}
    assert made.processing_class.chat_template == tokenizer.chat_template
    assert "to_target.alpha(alpha=0.3)" in made.metrics


@pytest.mark.slow
def test_the_known_optimum_is_reached_on_a_language_that_can_be_enumerated(tmp_path):
    """D(π‖p), exact over all 3,906 texts of each of the toy's prompts, falls below a tenth of the untouched model's 3.97."""

    def share(prompts, completions, **columns):
        return [c.count("a") / 5 for c in completions]

    prompts, beta = ["a", "b", "c d", "d a b"], 0.1
    policy = {"max_steps": 40, "num_prompts": 4, "num_generations": 32, "max_completion_length": 5, "learning_rate": 1e-2,
              "lr_scheduler_type": "linear", "per_device_train_batch_size": 128}  # fmt: skip
    rows = Dataset.from_dict({"prompt": prompts})
    trained = align("toy", share, rows, beta=beta, output_dir=tmp_path / "toy", policy=policy, report_to="none")
    tokenizer, reference = load_tokenizer("toy"), AutoModelForCausalLM.from_pretrained(assets.toy())
    every = metrics.all_texts(len(tokenizer), [tokenizer.eos_token_id], 5)
    ids = [tokenizer(p)["input_ids"] for p in prompts]
    log_pi, log_a = (metrics.log_probs_of_all(lm, ids, every, 2048) for lm in (trained.model, reference))
    reward = torch.tensor(share([], tokenizer.batch_decode(every, skip_special_tokens=True)), dtype=torch.float64)
    log_p = (log_a + reward / beta).log_softmax(1)
    after, before = (float(divergences.exact(divergences.get("reverse_kl"), x, log_p).mean()) for x in (log_pi, log_a))
    assert after < 0.1 * before


# reward functions


def in_part(completions, references, **columns):
    return [None if i % 2 else float(len(c)) for i, c in enumerate(completions)]


class Judge:
    """An async callable that answers only while another waits beside it."""

    def __init__(self, calls, worth):
        self.calls, self.worth = calls, worth

    async def __call__(self, prompts, completions, completion_ids, trainer_state, **columns):
        self.calls.append(self)
        for _ in range(60_000):
            if len(self.calls) % 2 == 0:
                break
            await asyncio.sleep(0.001)
        else:
            raise AssertionError("nobody else waited")
        assert 1 <= trainer_state.global_step <= trainer_state.max_steps == 3
        return [self.worth * len(ids) for ids in completion_ids]


@pytest.mark.slow
def test_several_rewards_are_weighted_logged_and_may_leave_completions_out(small, data):
    calls: list = []
    judges = [Judge(calls, 1.0), Judge(calls, 10.0)]
    shout = functools.partial(praise, worth=2.0)
    funcs = [in_part, *judges, lambda completions, **columns: [1.0] * len(completions), {"name": "length"}]
    punish = get_soft_overlong_punishment(6, 3)
    made = small([*funcs, shout, punish], reward_weights=[1, 0.5, 0.25, -3, 2, 0.0, 1.5])
    names = ["in_part", "Judge", "Judge_2", "lambda", "length_2", "praise", "soft_overlong_punishment_reward"]
    assert list(made.config.scorers) == ["reward", *names]
    assert made.config.scorers["in_part"].path == f"{__name__}:in_part"
    assert made.config.scorers["lambda"].path == "rlhf_fdiv.library:given.lambda"
    table = tiny.completions(made.path / "policy")
    tokens = table["Judge"]
    assert table["in_part"].isna().mean() == 0.5
    assert (table["in_part"].dropna() == table["completions"].str.len()[table["in_part"].notna()]).all()
    assert (table["Judge_2"] == 10 * tokens).all()
    punished = [1.5 * x for x in punish(completion_ids=[[0] * int(n) for n in tokens])]
    assert min(punished) < 0
    rest = 0.5 * tokens + 2.5 * tokens - 3 + 2 * table["length_2"] + punished
    torch.testing.assert_close(
        torch.tensor((table["in_part"].fillna(0) + rest).values), torch.tensor(table["reward"].values)
    )
    by_step = table.groupby("step").mean(numeric_only=True)
    for name in names:
        torch.testing.assert_close(
            torch.tensor(made.metrics[name].values).double(), torch.tensor(by_step[name].values), rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_a_reward_model_in_memory_scores_as_its_folder_does(small, start, tmp_path, adapter):
    judge = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1)
    judge.config.pad_token_id = load_tokenizer(start).pad_token_id
    if adapter:
        judge = get_peft_model(
            judge, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
        )
    given = small([judge, praise], reward_processing_classes=[load_tokenizer(start), None])
    folder = tmp_path / "judge"
    (copy.deepcopy(judge).merge_and_unload() if adapter else judge).save_pretrained(folder)
    load_tokenizer(start).save_pretrained(folder)
    by_name = small([str(folder), praise], output_dir=tmp_path / "by_name")
    scores = [run.metrics[["reward", name]].to_numpy() for run, name in ((given, "reward_model"), (by_name, "judge"))]
    assert (scores[0] == scores[1]).all()
    assert scores[0].std() > 0
    assert small([judge, praise]).path == given.path  # whose tokenizer is the one under its name


def test_a_completion_that_no_reward_applies_to_is_an_error(small, tmp_path):
    def other(completions, **columns):
        return [None if i == 3 else 1.0 for i in range(len(completions))]

    found = tiny.problems(small, [in_part, other])
    assert "'reward' does not apply to completion 3" in found[0]
    found = tiny.problems(functools.partial(small, output_dir=tmp_path / "other"), in_part)
    assert "'in_part' does not apply to completion 1" in found[0]


# mistakes


def test_mistakes_are_told_before_any_model_is_loaded_and_leave_nothing(small, start, tmp_path):
    def told(*args, **options):
        (message,) = tiny.problems(functools.partial(small, *args, **options))
        assert not (tmp_path / "mine").exists()
        return message

    rows = Dataset.from_dict({"prompts": ["a"]})
    assert "train_dataset: must be a datasets.Dataset with a column 'prompt'" in told(train_dataset=rows)
    assert "not ['prompts']" in told(eval_dataset=rows)
    assert "not list" in told(train_dataset=[{"prompt": "a"}])
    assert told(polcy={}) == "polcy: unknown key; did you mean 'policy'?"
    assert "policy.max_step: unknown key; did you mean 'max_steps'?" in told(policy={"max_step": 3})
    assert "did you mean 'reverse_kl'?" in told(divergence="reverse_k1")
    assert "reward_weights: 1 for 2 reward_funcs" in told([praise, in_part], reward_weights=[1.0])
    assert "reward_funcs: is empty" in told([])
    assert "reward_funcs: float is no function" in told(3.0)
    lm = AutoModelForCausalLM.from_pretrained(start)
    assert "LlamaForCausalLM is no sequence classifier with one label" in told(lm)
    assert "reward_processing_classes: 1 for 2 reward_funcs" in told(
        [praise, in_part], reward_processing_classes=[None]
    )
    assert "target.beta" in told(beta=-1.0)
    assert "target.beta: unknown key" in told(target={"name": "pointwise", "scorer": "praise"})
    empty = Dataset.from_list([{"prompt": "a", "info": {}}])
    assert "train_dataset: cannot be written as Parquet" in told(train_dataset=empty)
    assert "praisee" in told(target={"name": "tilted", "reward": "praisee"})


def test_a_column_that_a_function_needs_is_missed_before_training(small, tmp_path):
    without = Dataset.from_list([{"prompt": "the film was"}])
    (message,) = tiny.problems(functools.partial(small, [praise, in_part], eval_dataset=without))
    assert re.match(r"scorers.in_part: .*:in_part needs references, no column of all rows of .*eval_dataset", message)
    assert not (tmp_path / "mine" / "policy").exists()
    assert required_columns(praise) == set()
    assert required_columns(lambda prompts, completions, /, kind, *more, worth=1, **columns: 0) == {"kind"}
    assert required_columns(max) == set()


def test_a_function_of_another_process_is_told_as_such(small, call):
    made = small(lambda completions, **columns: [0.0] * len(completions))
    del library.given.__dict__["lambda"]
    code, _, said = call("run", str(made.path / "resolved_config.yaml"), "resume=policy")
    assert code == 2
    assert "was given to align() from Python" in said


def test_align_is_loaded_when_asked_for():
    assert rlhf_fdiv.align is library.align
    with pytest.raises(AttributeError, match="aling"):
        rlhf_fdiv.aling  # noqa: B018


# docs/library.md


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page's blocks define, run one after the other exactly as written."""
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
            exec(compile(block, PAGE.name, "exec"), names)
        yield names


def options(tmp_path, **more):
    """One step of plain gradient descent with rate 1: the weights move by the negative gradient."""
    plain = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
    }
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    return {
        "output_dir": str(tmp_path),
        **plain,
        **quiet,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **more,
    }


@pytest.fixture
def pair(start):
    """A model that has moved away from its reference, the reference, and their tokenizer."""
    reference = AutoModelForCausalLM.from_pretrained(start)
    return perturbed(reference), reference, load_tokenizer(start)


def check_step(trainer, loss, lm):
    """The weights have moved by the gradient of `loss`, a function of `lm`, their copy before the step."""
    expected = torch.autograd.grad(loss, list(lm.parameters()))
    moved = [a.detach() - b.detach() for a, b in zip(lm.parameters(), trainer.model.parameters(), strict=True)]
    assert max(float(g.abs().max()) for g in expected) > 1e-4
    for step, gradient in zip(moved, expected, strict=True):
        torch.testing.assert_close(step, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_the_ten_lines_run_and_raise_the_objective(page):
    table = page["trained"].metrics
    assert len(table) == 40
    first = tiny.completions(page["trained"].path / "policy").query("step == 1")["alternates"]  # of the untouched model
    late = table["objective"][-5:]
    assert late.mean() - first.mean() > 5 * (first.sem() ** 2 + late.sem() ** 2) ** 0.5
    assert (page["trained"].path / "policy" / "model" / "config.json").is_file()
    assert list(page["several"].config.scorers) == ["reward", "alternates", "judge", "length_2"]


@pytest.mark.slow
@pytest.mark.parametrize("f", ["chi_mix", "js", "forward_kl"])
def test_the_dpo_example_takes_the_step_of_prefer(page, pair, data, tmp_path, f):
    model, reference, tokenizer = pair
    f, before = divergences.get(f), copy.deepcopy(model)
    rows = tiny.jsonl(Path(data["preferences_train"]))
    pairs = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows])
    args = page["DPOConfig"](**options(tmp_path, beta=0.5, per_device_train_batch_size=len(rows)))
    kind = type("Mine", (page["FDPOTrainer"],), {"f": f})
    trainer = kind(model, reference, args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    batch = collate(tokenize_pairs(rows, tokenizer, "", 20, 64), list(range(len(rows))), torch.device("cpu"))
    log_pi, log_a = (sequence_sum(Policy(lm)(batch).log_probs, batch.mask) for lm in (before, reference))
    prefer = Prefer(beta=0.5)
    chosen, rejected = prefer.reward(f, log_pi, log_a.detach()).chunk(2)
    loss = prefer.loss(chosen - rejected, torch.ones(len(rows))).mean()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-3)
    check_step(trainer, loss, before)


@pytest.mark.slow
@pytest.mark.parametrize("f", ["reverse_kl", "js"])
def test_the_grpo_example_takes_the_step_of_regularise(page, pair, data, tmp_path, f):
    model, reference, tokenizer = pair
    f, before, seen = divergences.get(f), copy.deepcopy(model), []

    def reward(prompts, completions, completion_ids, **columns):
        seen.append((prompts, completion_ids, praise(prompts, completions)))
        return seen[-1][2]

    rows = Dataset.from_list(tiny.jsonl(Path(data["prompts_train"])))
    more = options(tmp_path, num_generations=4, per_device_train_batch_size=16, max_completion_length=6)
    page["regularised_grpo"](model, reference, tokenizer, reward, rows, f, 0.5, **more).train()
    ((prompts, ids, rewards),) = seen
    batch = Sequences(*pad(tokenizer(prompts)["input_ids"], 0, "left"), *pad(ids, 0, "right"))
    log_pi, log_a = (Policy(lm)(batch).log_probs for lm in (before, reference))
    potential = torch.tensor(rewards) / 0.5
    paid = token_rewards(Regularise(0.5), f, log_pi.detach(), log_a.detach(), batch.mask, potential, torch.zeros(16))
    advantages = RLOO()(paid, batch.mask, 4).advantages
    loss = -(advantages * log_pi).sum() / 16 * (3 / 4) / 6
    trainer = type("Trained", (), {"model": model})
    check_step(trainer, loss, before)


@pytest.mark.slow
@pytest.mark.parametrize("f", ["hellinger", "reverse_kl"])
def test_the_distillation_example_takes_the_step_of_distil(page, pair, data, tmp_path, f):
    model, teacher, tokenizer = pair
    f, before, seen = divergences.get(f), copy.deepcopy(model), []

    class Seen(page["FDistillationTrainer"]):
        def compute_loss(self, model, inputs, **options):
            seen.append(inputs)
            return super().compute_loss(model, inputs, **options)

    Seen.f = f
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in tiny.jsonl(Path(data["prompts_train"]))])
    args = page["DistillationConfig"](**options(tmp_path, per_device_train_batch_size=8, max_completion_length=6))
    trainer = Seen(model, teacher, args, rows, processing_class=tokenizer)
    trainer.train()
    (inputs,) = seen
    batch = Sequences(*(inputs[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")))
    log_pi, log_q = (Policy(lm)(batch).logits.log_softmax(-1) for lm in (before, teacher))
    by_token = Distil().divergence(f, log_pi, log_q.detach()) * batch.mask
    check_step(trainer, by_token.sum() / batch.mask.sum(), before)
