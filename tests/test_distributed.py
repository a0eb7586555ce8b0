"""One result, however launched: 5 steps by 2 processes on the CPU, with DDP, FSDP2 and ZeRO, against 5 by one process, on
the same global batch."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import completions, jsonl, run, weights, write_config
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_fdiv.config.options import PolicyOptions
from rlhf_fdiv.models import Policy
from rlhf_fdiv.stages.training import configure_zero

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

FULL, LORA = "model.lora=null", "model.lora={r: 2, lora_alpha: 4}"
FLOAT32 = ("model.dtype=float32", "{stage}.optim=sgd", "{stage}.learning_rate=0.03")  # AdamW would amplify rounding
MOMENTS = "{name: moments, moments: {praise: 0.5}, num_prompts: 12, num_generations: 8, dual_learning_rate: 0.3}"
CASES = {
    "rloo": ("policy", LORA),
    "all weights": ("policy", FULL, "divergence=js", "policy.warm_start_generations=4", "policy.max_grad_norm=0.5"),
    "gdc": ("policy", FULL, "divergence=forward_kl", "estimator=reinforce", "policy.reference_share=0.5"),
    "scored anew": ("policy", FULL, "divergence=js", "estimator={name: rloo, num_epochs: 2}"),
    "interrupted": ("policy", FULL, "policy.save_steps=2"),  # by 2 processes; see below
    "replay": ("policy", FULL, "policy.replay_steps=2"),
    "grpo": ("policy", FULL, "estimator={name: grpo, num_epochs: 2, clip_range: 0.01}"),
    "ppo": ("policy", FULL, "estimator={name: ppo, num_epochs: 2, num_minibatches: 1}"),
    "prefixes": (
        "policy",
        FULL,
        "estimator={name: ppo, critic: prefixes, num_minibatches: 1}",
        "policy.replay_steps=1",
    ),
    "prefixes, one a prompt": (
        "policy",
        FULL,
        "policy.num_prompts=6",
        "policy.num_generations=1",
        "policy.warm_start_generations=4",
        "objective=regularise",
        "estimator={name: ppo, critic: prefixes, num_minibatches: 1}",
        "policy.replay_steps=1",
    ),
    "chunked": ("policy", FULL, "policy.logprob_chunk=4"),
    "moments": ("policy", FULL, f"target={MOMENTS}"),
    "prefer": ("prefer", FULL, "divergence=chi_mix"),
    "prefer, adapter": ("prefer", LORA),
    "distil": ("distil", FULL, "objective.on_policy=1.0"),
    "distil, data": ("distil", LORA, "objective.on_policy=0.0"),
    "rloo, float32": ("policy", FULL, *FLOAT32),
    "prefer, float32": ("prefer", FULL, *FLOAT32),
    "distil, float32": ("distil", FULL, *FLOAT32),
}

# every case in one launch, since most of a launch is imports; the first end of training would take the group along
LAUNCHED = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

if sys.argv[2] != "ddp":  # which accelerate gives to GPUs alone
    os.environ["ACCELERATE_USE_CPU"] = "false"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
if sys.argv[2] == "fsdp":
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
if sys.argv[2].startswith("zero"):
    zero = {"stage": int(sys.argv[2][-1]), "stage3_param_persistence_threshold": 0}  # or what is small stays whole
    file = {"zero_optimization": zero, "gradient_accumulation_steps": 2, "train_batch_size": 99, "gradient_clipping": 0.1}
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu",
                   "ACCELERATE_DEEPSPEED_CONFIG_FILE": json.dumps(file)}  # of which the run's config is heard instead
    import deepspeed.ops
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo, and nothing to compile

from rlhf_fdiv import config
from rlhf_fdiv.stages import policy_log, training
from rlhf_fdiv.stages.common import execute

torch.set_num_threads(1)
Accelerator.end_training = lambda self: None
shares = []

def size(weights):
    return sum(getattr(x, "ds_numel", x.numel()) for x in weights)

def held(weights):
    return sum((x.to_local() if isinstance(x, DTensor) else getattr(x, "ds_tensor", x)).numel() for x in weights)

made = training.Training.__init__

def recorded(self, *args, **kwargs):
    made(self, *args, **kwargs)
    weights = list(args[0].parameters())
    stepped = [x for group in self.optimizer.param_groups for x in group["params"]]
    optimised = getattr(self.optimizer.optimizer, "fp32_partitioned_groups_flat", stepped)  # ZeRO-3's
    trained = size(x for x in weights if x.requires_grad)
    shares.append((held(weights) / size(weights), held(optimised) / trained))

training.Training.__init__ = recorded
logged = policy_log.Log.step

def stop(self, step, *args):
    if step == 4:
        raise KeyboardInterrupt
    return logged(self, step, *args)

for name, words in json.loads(Path(sys.argv[1]).read_text()).items():
    asked = config.load(words[0], words[1:])
    if name == "interrupted":
        policy_log.Log.step = stop
        try:
            execute(asked, asked.stages)
        except KeyboardInterrupt:
            policy_log.Log.step = logged
    execute(asked, asked.stages)
state = Accelerator()
kind = [state.distributed_type.value, state.num_processes, torch.distributed.get_backend(), shares]
Path(f"{sys.argv[1]}.{state.process_index}").write_text(json.dumps(kind))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def asked(data, tmp_path_factory):
    """Case → config file and overrides, the same for both ways; a run folder of each is `runs/one` or `runs/two`."""
    folder = tmp_path_factory.mktemp("distributed")
    start, teacher = str(folder / "start"), str(folder / "teacher")
    config = GPT2Config(  # a Llama's norms are in float32 whatever its dtype
        vocab_size=len(tiny.WORDS), n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.1,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    for seed, place in enumerate((start, teacher)):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(place)
        tiny.tokenizer().save_pretrained(place)
    raw = tiny.raw_config(start, data, folder / "runs")
    raw |= {
        "scorers": {"praise": {"name": "pattern", "pattern": tiny.PATTERN}},
        "target": {"name": "tilted", "reward": "praise", "beta": 0.5},
        "report_to": "none",
        "prefer": {"num_pairs": 8, "max_completion_length": 8},
        "distil": {"num_prompts": 8, "max_completion_length": 6, "teacher": teacher},
    }
    raw["model"]["dtype"] = "float64"
    for stage in ("policy", "prefer", "distil"):
        raw[stage] |= {"model": start, "max_steps": 5, "save_steps": 5, "learning_rate": 1e-2}
        raw[stage]["per_device_train_batch_size"] = 4
    raw["policy"]["num_prompts"] = 6
    out = {}
    for name, (stage, *overrides) in CASES.items():
        objective = "match" if stage == "policy" else {"name": stage}
        place = folder / name.replace(", ", "-").replace(" ", "-")
        place.mkdir()
        path = write_config(
            place / "asked.yaml", raw | {"objective": objective, "stages": [stage], "output_dir": str(place)}
        )
        out[name] = [path, *(x.format(stage=stage) if x in FLOAT32 else x for x in overrides)]
    return out


KINDS = {"ddp": "MULTI_CPU", "fsdp": "FSDP", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
SHARDED = {"ddp": (1, 1), "fsdp": (0.5, 0.5), "zero1": (1, 0.5), "zero2": (1, 0.5), "zero3": (0.5, 0.5)}


def cases_of(wrapper):
    """Name → what is asked for beside the case's own words. DeepSpeed steps in float32 alone; there grpo divides the
    rounding of equal scores by its own std, so that DDP is as far from one process; and ZeRO-3 refuses chunks."""
    if not wrapper.startswith("zero"):
        return dict.fromkeys(CASES, ())
    left_out = {"grpo", *(["chunked"] if wrapper == "zero3" else [])}
    names = [name for name in CASES if "float32" not in name and name not in left_out]
    return {name: [x.format(stage=CASES[name][0]) for x in FLOAT32] for name in names}


@pytest.fixture(scope="module", params=KINDS)
def two(request, asked, tmp_path_factory):
    """The wrapper, and what two processes of it were: type, number, backend, and of each case the shares of the weights
    and of what the optimiser steps along that each held."""
    if request.param.startswith("zero") and not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed: pip install -e '.[deepspeed]'")
    folder = tmp_path_factory.mktemp("launched")
    (folder / "launched.py").write_text(LAUNCHED)
    cases = {n: [*asked[n], f"name={request.param}", *words] for n, words in cases_of(request.param).items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    said = tiny.two_processes(str(folder / "launched.py"), str(folder / "cases.json"), request.param)
    kinds = [folder / f"cases.json.{rank}" for rank in range(2)]
    assert all(path.is_file() for path in kinds), said
    return request.param, [json.loads(path.read_text()) for path in kinds]


def test_there_were_two_processes_of_the_kind_that_was_asked_for(two):
    wrapper, kinds = two
    assert [kind[:3] for kind in kinds] == [[KINDS[wrapper], 2, "gloo"]] * 2
    for *_, shares in kinds:
        assert len(shares) == len(cases_of(wrapper)) + 1  # one was interrupted
        assert all(held == pytest.approx(SHARDED[wrapper], abs=0.01) for held in shares)


def figures(row):
    """All that must agree; nan what could not be measured."""
    return {k: float("nan") if v is None else v for k, v in row.items() if k not in ("step", "seconds")}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(asked, two, name):
    stage, words = CASES[name][0], cases_of(two[0]).get(name)
    if words is None:
        pytest.skip(f"{name} is not compared under {two[0]}: cases_of says why")
    alone = run(*asked[name], f"name=one{len(words)}", *words)
    out = [alone.path / stage, Path(asked[name][0]).parent / two[0] / stage]
    exact = not words and "float32" not in name
    rows = [jsonl(folder / "metrics.jsonl") for folder in out]
    assert [row.pop("step") for row in rows[1]] == [1, 2, 3, 4, 5]
    for alone, together in zip(*rows, strict=True):
        alone, together = (figures(row) for row in (alone, together))
        # six digits are printed; what is 0, or a loss of either sign, is left with the rounding of log-probs
        assert together == pytest.approx(alone, rel=2e-5, abs=1e-12 if exact else 1e-5, nan_ok=True)
    states = [json.loads((folder / "checkpoint-5" / "policy_state.json").read_text()) for folder in out]
    if stage == "prefer":
        held_out = [json.loads((folder / "accuracy.json").read_text()) for folder in out]
        assert held_out[1] == pytest.approx(held_out[0], rel=1e-9 if exact else 1e-5)
    if stage == "policy":
        tables = [completions(folder).sort_values(["step", "prompts", "completions"]) for folder in out]
        assert tables[0]["completions"].tolist() == tables[1]["completions"].tolist()
        assert states[0]["log_partition"]["prompts"] == states[1]["log_partition"]["prompts"]
        for kept in zip(*(state["log_partition"]["kept"] for state in states), strict=True):
            flat = [[float(x) for x in torch.tensor(one).flatten()] for one in kept]
            assert flat[1] == pytest.approx(flat[0], rel=1e-9 if exact else 1e-5, abs=1e-12 if exact else 1e-5)
    models = [weights(folder / "model") for folder in out]
    for key, alone in models[0].items():
        apart = float((models[1][key] - alone).double().norm())
        size = float(alone.double().norm())
        assert apart <= (1e-9 * size if exact else 1e-5 * max(size, 1)), key  # biases are sums that cancel


@pytest.mark.parametrize(
    ("word", "dtype", "options"),
    [("model.dtype", torch.float64, {}), ("value head", torch.bfloat16, {"value_head": True}),
     ("logprob_chunk", torch.float32, {"logprob_chunk": 4})],
)  # fmt: skip
def test_what_deepspeed_would_do_otherwise_is_refused(word, dtype, options):
    policy = Policy(GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)).to(dtype), **options)
    zero = SimpleNamespace(zero_stage=3, deepspeed_config={})
    assert word in tiny.problems(configure_zero, zero, policy, PolicyOptions())[0]


def test_sft_and_the_reward_model_are_launched_the_same_way(data, tmp_path):
    raw = tiny.raw_config(tiny.model_folder(tmp_path / "start"), data, tmp_path) | {"report_to": "none"}
    raw["model"]["dtype"] = "float64"
    path = write_config(tmp_path / "asked.yaml", raw)
    for stage, model in (("sft", "model/model.safetensors"), ("reward", "model/head.safetensors")):
        alone = run(path, f"stages=[{stage}]", f"name=one-{stage}").path / stage
        words = (f"name=two-{stage}", "sft.per_device_train_batch_size=4")
        said = tiny.two_processes("-m", f"rlhf_fdiv.stages.{stage}", path, *words)
        together = tmp_path / f"two-{stage}" / stage
        assert (together / "finished.json").is_file(), said
        one, two = (load_file(folder / model) for folder in (alone, together))
        assert tiny.away(one, two) <= (1e-6 if stage == "sft" else 0)  # a Llama's norms are in float32
        rows = [tiny.jsonl(folder / "metrics.jsonl") for folder in (alone, together)]
        logged = [[row["loss"] for row in each if "loss" in row] for each in rows]
        assert logged[0], "each process would open the file anew"
        assert logged[1] == pytest.approx(logged[0], abs=2e-3)
