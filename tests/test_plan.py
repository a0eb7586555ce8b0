"""What `rlhf-fdiv plan` tells, against what is there: weights, cache, optimiser, activations and a measured peak."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, GPT2Config, LlamaConfig

from rlhf_fdiv import config as configs
from rlhf_fdiv import footprint
from rlhf_fdiv import plan as planning
from rlhf_fdiv.footprint import Ledger, Use, Work, measure, size
from rlhf_fdiv.model_options import LoraOptions, ModelOptions
from rlhf_fdiv.models import adapted, load_policy, with_reference
from rlhf_fdiv.plan import held
from rlhf_fdiv.sequences import Sequences

IDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, **IDS}
SHAPES = {
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=6, n_head=4, **IDS),
    "llama": LlamaConfig(intermediate_size=64, num_key_value_heads=2, **SMALL),
    "gemma3": Gemma3TextConfig(intermediate_size=64, num_key_value_heads=1, head_dim=16, sliding_window=9, **SMALL),
}
WORK = Work(rows=8, distinct=2, prompts=2, generations=4, prompt_length=7, length=9, several=False)


@pytest.fixture
def asked(data, tmp_path):
    """A config of all stages whose model is a config alone."""
    (tmp_path / "model").mkdir()
    SHAPES["llama"].save_pretrained(tmp_path / "model")
    return tiny.write_config(tmp_path / "a.yaml", tiny.raw_config(str(tmp_path / "model"), data, tmp_path))


@pytest.mark.parametrize("lora", [None, LoraOptions(r=2)], ids=["full", "lora"])
def test_weights_are_those_of_the_loaded_model(lora, start, data, tmp_path):
    raw = tiny.raw_config(start, data, tmp_path) | {"estimator": "ppo"}
    raw["model"] |= {"lora": None, "dtype": "bfloat16"}
    config = configs.parse({"name": "x", **raw})
    options = ModelOptions(start, "bfloat16", lora)
    policy, reference = load_policy(start, options, value_head=True)
    object.__setattr__(config, "model", options)
    told, frozen = footprint.make(config, "policy")
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert size(told) == sum(p.numel() * p.element_size() for p in policy.parameters())
    assert size(told, trained=True) == sum(p.numel() * p.element_size() for p in trained)
    assert size(frozen.policy) == size(reference.policy)
    use = Use(size(told), size(told, trained=True), 0, 0, 0, 0, 0, False, (0, 0), (0, 0))
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = [x[k] for x in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert held(use, "one device", 1)["optimiser"] == sum(x.nbytes for x in moments)


@pytest.mark.parametrize("architecture", SHAPES)
def test_cache_bytes_are_those_of_a_real_cache(architecture):
    shape = SHAPES[architecture]
    lm, cache = AutoModelForCausalLM.from_config(shape), DynamicCache(config=shape)
    lm(torch.ones(3, 20, dtype=torch.long), past_key_values=cache)
    real = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    assert footprint.cache_bytes(shape, 3, 20, 4) == sum(x.numel() * 4 for x in real)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "share", "lora"),
    [("gpt2", True, None), ("gemma3", True, None), ("llama", False, None), ("llama", True, LoraOptions(r=2))],
)
def test_activations_are_those_of_the_real_update(architecture, share, lora):
    """The same ledger over real tensors: half of the rows have another prompt, which is shorter."""

    def made(device):
        with torch.device(device):
            shape = SHAPES[architecture].__class__.from_dict(SHAPES[architecture].to_dict())
            shape.num_hidden_layers = 2
            lm = adapted(AutoModelForCausalLM.from_config(shape).eval())
            pair = with_reference(lm, ModelOptions("x", lora=lora), False, 0)
        pair[0].share_prompts = share
        return pair

    def update(ledger, policy, run):
        for p in policy.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        before = ledger.most = ledger.now
        run().backward()
        return ledger.most - before

    pair = made("meta")
    with footprint.without_storage(*pair, distinct=2) as ledger:
        told = update(ledger, pair[0], lambda: footprint.loss(*pair, "policy", WORK))
    policy, reference = made("cpu")
    prompts, texts = torch.ones(8, 7, dtype=torch.long), torch.ones(8, 9, dtype=torch.long)
    prompts[4:] = 2
    padding = torch.ones_like(prompts)
    padding[:4, 0] = 0
    batch = Sequences(prompts, padding, texts, torch.ones_like(texts))
    with Ledger() as ledger:
        for module in (policy, reference.policy):
            for x in (*module.parameters(), *module.buffers()):
                ledger._enter(x)
        real = update(ledger, policy, lambda: policy(batch).log_probs.sum())
    assert told == pytest.approx(real, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "policy", "prefer"])
def test_layers_that_are_not_run_add_what_the_others_do(stage, asked, monkeypatch):
    config = configs.load(asked, ["model.lora=null", "policy.logprob_chunk=16"])
    work = Work.of(config, stage, 1, 5)
    some = measure(config, stage, work)
    monkeypatch.setattr(footprint, "DEPTH", 6)
    whole = measure(config, stage, work)
    assert some._replace(update=0, sampling=0) == whole._replace(update=0, sampling=0)
    assert some.update == pytest.approx(whole.update, rel=0.05)
    assert some.sampling == pytest.approx(whole.sampling, rel=0.02)


@pytest.mark.slow
def test_checkpointing_takes_less(asked):
    config = configs.load(asked, ["model.lora=null"])
    work = Work.of(config, "policy", 1, 5)
    assert measure(config, "policy", work, False, True).update < 0.7 * measure(config, "policy", work, False).update


def test_a_share_is_the_whole_divided():
    use = Use(800, 800, 800, 800, 0, 0, 0, True, (100, 100), (0, 0))
    for strategy, shared in {
        "DDP": set(), "ZeRO-1": {"optimiser"}, "ZeRO-2": {"optimiser"}, "FSDP2": {"weights", "gradients", "optimiser"},
        "ZeRO-3": {"weights", "optimiser"},
    }.items():  # fmt: skip
        found = held(use, strategy, 8)
        whole = {"weights": 800, "gradients": 800, "optimiser": 2400 if "ZeRO" in strategy else 1600}
        assert {k for k, v in whole.items() if found[k] == v / 8} == shared


@pytest.mark.slow
def test_the_command_needs_no_weight(asked, call):
    code, out, err = call(
        "plan",
        asked,
        "--devices",
        "1",
        "--json",
        "stages=[policy]",
        "model.lora=null",
        "scorers.reward.path=smollm2-135m",
        "scorers.total={name: sum, of: {reward: 2}}",
        "target.reward=total",
    )
    assert code == 0, err
    (row,) = json.loads(out)
    assert (row["stage"], row["strategy"], row["fits"]) == ("policy", "one device", True)
    assert row["others"] == pytest.approx((134_515_008 * 4) / 2**30, abs=0.001)


def test_the_tables_say_what_fits(asked, call, monkeypatch):
    gib = 2**30
    use = Use(8 * gib, 8 * gib, 8 * gib, 8 * gib, 0, gib, 2 * gib, True, (gib, gib), (0, 0))
    monkeypatch.setattr(planning, "measure", lambda *args: use)
    code, out, _ = call("plan", asked, "--memory", "28", "stages=[policy]")
    rows = [line.split("│")[1:] for line in out.splitlines() if line.startswith("│")]
    assert code == 0
    assert [row[0].strip() for row in rows] == list(planning.STRATEGIES) * 2  # all weights, LoRA
    fitting = ["ZeRO-2", "FSDP2", "FSDP2, checkpointing"]
    assert [row[0].strip() for row in rows if "yes" in row[-2]] == fitting * 2
    assert out.count("take ZeRO-2") == 2
    assert call("plan", asked, "--memory", "9", "stages=[sft]")[1].count("nothing fits") == 1


def test_a_config_without_training_is_refused(asked, call):
    code, _, err = call("plan", asked, "stages=[evaluate]")
    assert (code, err) == (2, "error: stages: sft, policy and prefer are planned, and this config has none of them\n")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama, 8k", "gpt2, 50k, chunks"])
def test_a_measured_peak_is_within_a_quarter_of_the_plan(case):
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmarks/memory.py"), "--case", case, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (_, _, ratio), *_ = json.loads(done.stdout.splitlines()[-1]).values()
    assert 0.75 < ratio < 1.25
