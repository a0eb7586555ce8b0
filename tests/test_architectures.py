"""Every family of models through every stage, by what the command line calls; its adapters; and what is refused."""

import json

import pytest
import tiny
import torch
from architectures import SIZES, tiny_model
from peft import PeftModel
from tiny import problems, raw_config, run, write_config
from tokenizers.pre_tokenizers import ByteLevel
from toy import change_adapter
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CLIPConfig,
    Gemma3Config,
    Qwen2Tokenizer,
    T5Config,
    ViTConfig,
)

from rlhf_fdiv import config as configs
from rlhf_fdiv.model_options import LoraOptions, ModelOptions
from rlhf_fdiv.models import load_causal_lm, load_policy, load_tokenizer, save_policy
from rlhf_fdiv.stages.common import check_inputs

every_family = pytest.mark.parametrize("architecture", SIZES)
SHORT = ["sft.max_steps=2", "policy.max_steps=2", "evaluate.num_prompts=4", "evaluate.num_generations=2"]
MORE = {
    "prefer": {"max_steps": 2, "num_pairs": 4, "max_completion_length": 6, "learning_rate": 1e-2},
    "distil": {"max_steps": 2, "num_prompts": 4, "max_completion_length": 6, "learning_rate": 1e-2},
}


def tokenizer_of(architecture):
    """Words; by letter for Qwen 2, since transformers reads every tokenizer beside one as one of bytes."""
    if architecture != "qwen2":
        return tiny.tokenizer()
    letters = {letter: i for i, letter in enumerate(["<|endoftext|>", "<|im_end|>", *sorted(ByteLevel.alphabet())])}
    return Qwen2Tokenizer(letters, [], eos_token="<|im_end|>", pad_token="<|endoftext|>")


def folder_of(architecture, folder):
    tokenizer = tokenizer_of(architecture)
    tiny_model(architecture, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder))("a film")["input_ids"] == tokenizer("a film")["input_ids"]
    return str(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 3, 7, 2, 9, 4, 6, 8]])).logits


@pytest.mark.slow
@every_family
def test_every_stage_runs(architecture, data, tmp_path):
    """…, and leaves a merged model and the adapter alone, which are one policy for transformers and peft."""
    start = folder_of(architecture, tmp_path / "start")
    path = write_config(tmp_path / "all.yaml", raw_config(start, data, tmp_path / "runs") | MORE)
    first = run(path, *SHORT)
    again = [*SHORT, f"reuse={first.path}", f"scorers.reward.path={first.stage('reward')}/model"]
    pairs = run(path, *again, "name=pairs", "objective=prefer", "stages=[sft, prefer]")
    teacher = f"distil.teacher={first.stage('policy')}/model"
    taught = run(path, *again, "name=taught", "objective=distil", "stages=[sft, distil]", teacher)
    report = json.loads((first.stage("evaluate") / "metrics.json").read_text())
    assert report["policy"]["kl_reference"] > 0
    for out in (first.stage("policy"), pairs.stage("prefer"), taught.stage("distil")):
        base = AutoModelForCausalLM.from_pretrained(first.stage("sft") / "model")
        before, merged = logits(base), logits(AutoModelForCausalLM.from_pretrained(out / "model"))
        assert (merged - logits(PeftModel.from_pretrained(base, out / "adapter"))).abs().max() < 1e-5
        assert (merged - before).abs().max() > 1e-3, "it has been trained"


@pytest.mark.parametrize(
    "target_modules", ["all-linear", pytest.param(None, marks=pytest.mark.slow, id="peft's choice")]
)
@every_family
def test_an_adapter_saved_alone_or_merged_is_the_trained_policy(architecture, target_modules, tmp_path):
    start = folder_of(architecture, tmp_path / "start")
    lora = LoraOptions(r=2, lora_alpha=4, target_modules=target_modules)
    policy, _ = load_policy(start, ModelOptions(start, lora=lora))
    before = logits(policy.lm)
    change_adapter(policy.lm)
    trained = logits(policy.lm)
    assert (trained - before).abs().max() > 0.1
    save_policy(policy, load_tokenizer(start), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(start)
    assert torch.allclose(logits(base), before, rtol=0, atol=1e-5)
    loaded = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        PeftModel.from_pretrained(base, tmp_path / "adapter"),
    ]
    loaded += [load_causal_lm(str(tmp_path / name), ModelOptions(start)) for name in ("model", "adapter")]
    for model in loaded:
        assert torch.allclose(logits(model), trained, rtol=0, atol=1e-5)


REFUSED = {
    "t5": (T5Config(d_model=16, num_layers=1, vocab_size=24), "is an encoder–decoder"),
    "bert": (BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=24), "is a masked LM"),
    "gemma3": (Gemma3Config(), "reads more than text; save its language model alone"),
    "clip": (CLIPConfig(), "reads more than text"),
    "vit": (ViTConfig(), "is no language model that transformers knows"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_decoder_is_refused_before_weights_load(kind, data, tmp_path):
    config, said = REFUSED[kind]
    config.save_pretrained(tmp_path / "start")
    tiny.tokenizer().save_pretrained(tmp_path / "start")
    path = write_config(tmp_path / "a.yaml", raw_config(str(tmp_path / "start"), data, tmp_path / "runs"))
    for stage in ("sft", "reward", "policy", "prefer", "evaluate"):
        (told,) = problems(check_inputs, configs.load(path), [stage])
        assert told.startswith(f"model {tmp_path / 'start'}: {kind} ")
        assert said in told
