"""What one policy step costs, as a ratio to what the model itself costs, beside TRL's trainers.

    python benchmarks/step.py [--model small] [--steps 5] [--prompts 8] [--json]

In one process and one thread each, interleaved, after warm-up: our stage's own steps; a floor of HF `generate`, one reference
forward, one policy forward and backward and the optimiser; a hand-tuned floor of the same maths that imports nothing of
rlhf_fdiv; TRL's GRPO and RLOO on the same model, prompts, lengths and reward. CPU seconds, medians with least and most;
wall seconds where there is a GPU, which all of them then use. Peak memory is that of a process of its own for each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.cache_utils import DynamicLayer

PROMPTS, GENERATIONS, LENGTH, RATE = 8, 8, 40, 1e-5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Setup(NamedTuple):
    """How a model is made; `folder` holds it with its tokenizer and prompts."""

    make: Callable[[Path], None]
    dtype: str = "float32"


def random_gpt2(vocab: int, width: int, layers: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0").save_pretrained(folder)
        ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=vocab, n_embd=width, n_layer=layers, n_head=4, n_positions=128, **ids)
        GPT2LMHeadModel(config).save_pretrained(folder)
        generator = torch.Generator().manual_seed(1)
        rows = [torch.randint(2, vocab, (8 + i % 9,), generator=generator).tolist() for i in range(64)]
        write_prompts(folder, [" ".join(f"w{token}" for token in row) for row in rows])

    return make


def smollm2(folder: Path) -> None:
    from rlhf_fdiv import assets, film_reviews

    model = AutoModelForCausalLM.from_pretrained(assets.smollm2_135m())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(assets.smollm2_135m()).save_pretrained(folder)
    with (film_reviews.build() / "prompts_train.jsonl").open(encoding="utf-8") as lines:
        write_prompts(folder, [json.loads(line)["prompt"] for line in lines][:64])


def write_prompts(folder: Path, prompts: list[str]) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")


SETUPS = {
    "small": Setup(random_gpt2(8192, 256, 4)),
    "vocab50k": Setup(random_gpt2(50257, 256, 4)),
    "smollm2": Setup(smollm2),
    "smollm2-bf16": Setup(smollm2, "bfloat16"),
}


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [len(set(text.split())) / 10 for text in completions]


# -- the contestants: each is an iterator that makes one step whenever it is asked ---------------------------------------


def ours(folder: Path, setup: Setup, out: Path, **policy: Any) -> Iterator[Any]:
    from rlhf_fdiv import config as configs
    from rlhf_fdiv.stages import policy as stage
    from rlhf_fdiv.stages.common import prepare_process
    from rlhf_fdiv.tracking import RunFolder

    prepare_process()
    raw = {
        "name": "ours", "output_dir": str(out), "stages": ["policy"], "report_to": "none",
        "model": {"name_or_path": str(folder), "dtype": setup.dtype},
        "data": {"prompts_train": str(folder / "prompts.jsonl")},
        "scorers": {"reward": {"name": "function", "path": f"{Path(__file__).stem}:reward"}},
        "policy": {"max_steps": 10_000, "num_prompts": PROMPTS, "num_generations": GENERATIONS, "learning_rate": RATE,
                   "max_completion_length": LENGTH, "per_device_train_batch_size": PROMPTS * GENERATIONS,
                   "save_steps": 10_000, **policy},
    }  # fmt: skip
    config = configs.parse(raw)
    run = RunFolder(config)
    run.prepare()
    stage_out = run.stage("policy")
    stage_out.mkdir(parents=True)
    return stage.steps(config, run, stage_out)


def load(folder: Path, setup: Setup) -> tuple[Any, Any, Any, list[str]]:
    """Policy, reference, tokenizer and prompts, without any of our code."""
    dtype = getattr(torch, setup.dtype)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(DEVICE) for _ in range(2)]
    models[1].requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    rows = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return *models, tokenizer, [json.loads(row)["prompt"] for row in rows]


def batches(tokenizer: Any, prompts: list[str]) -> Iterator[Any]:
    step = 0
    while True:
        yield tokenizer(
            [prompts[(step * PROMPTS + i) % len(prompts)] for i in range(PROMPTS)], return_tensors="pt", padding=True
        ).to(DEVICE)
        step += 1


def log_probs_of(model: Any, ids: Any, mask: Any, completion: Any) -> Any:
    """log π of a completion's tokens by gather − logsumexp, as most code does it."""
    length = completion.shape[1]
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=length + 1).logits[:, :-1].float()
    return logits.gather(-1, completion[..., None]).squeeze(-1) - torch.logsumexp(logits, -1)


def hf_floor(folder: Path, setup: Setup, out: Path) -> Iterator[Any]:
    """`generate`, one reference forward, one policy forward and backward, the optimiser: what any method must do."""
    policy, reference, tokenizer, prompts = load(folder, setup)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0)
    for batch in batches(tokenizer, prompts):
        with torch.no_grad():
            ids = policy.generate(**batch, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=LENGTH,
                                  num_return_sequences=GENERATIONS, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
            completion = ids[:, batch.input_ids.shape[1] :]
            mask = torch.cat([batch.attention_mask.repeat_interleave(GENERATIONS, 0), torch.ones_like(completion)], 1)
            score = torch.tensor(reward([], tokenizer.batch_decode(completion, skip_special_tokens=True))).to(DEVICE)
            log_a = log_probs_of(reference, ids, mask, completion).sum(1)
        log_pi = log_probs_of(policy, ids, mask, completion).sum(1)
        finish(optimiser, policy, log_pi, log_a, score)
        yield


def finish(optimiser: Any, policy: Any, log_pi: Any, log_a: Any, score: Any) -> None:
    """Leave-one-out REINFORCE of r − β·log π/a, and the step."""
    gain = (score - 0.1 * (log_pi.detach() - log_a)).view(PROMPTS, GENERATIONS)
    advantage = (gain - (gain.sum(1, keepdim=True) - gain) / (GENERATIONS - 1)).flatten()
    (-(advantage * log_pi).mean()).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


class Preallocated(DynamicLayer):
    """Keys and values of the final size, written in place."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            width = self.keys.shape[2] + 1
            for whole, new in zip(self.whole, (key_states, value_states), strict=True):
                whole[:, :, width - 1 : width] = new
            self.keys, self.values = (whole[:, :, :width] for whole in self.whole)
        return self.keys, self.values

    def expand(self) -> None:
        self.whole = []
        for x in (self.keys, self.values):
            whole = x.new_empty(x.shape[0] * GENERATIONS, x.shape[1], x.shape[2] + LENGTH, x.shape[3])
            whole[:, :, : x.shape[2]] = x.repeat_interleave(GENERATIONS, 0)
            self.whole.append(whole)
        self.keys, self.values = (whole[:, :, : self.keys.shape[2]] for whole in self.whole)


def tuned_floor(folder: Path, setup: Setup, out: Path) -> Iterator[Any]:
    """The same maths, as fast as we know how to write it: prompts read once, a preallocated cache, inverse CDF,
    cross_entropy."""
    policy, reference, tokenizer, prompts = load(folder, setup)
    for model in (policy, reference):
        for module in model.modules():
            if type(module).__name__ == "NewGELUActivation":
                module.forward = lambda x: F.gelu(x, approximate="tanh")
    optimiser = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0)
    rows = PROMPTS * GENERATIONS
    for batch in batches(tokenizer, prompts):
        with torch.no_grad():
            attention = batch.attention_mask
            positions = (attention.cumsum(1) - 1).clamp(min=0)
            cache = Cache(layers=[Preallocated() for _ in range(policy.config.num_hidden_layers)])
            logits = policy(input_ids=batch.input_ids, attention_mask=attention, position_ids=positions,
                            past_key_values=cache, logits_to_keep=1).logits[:, -1]  # fmt: skip
            for layer in cache.layers:
                layer.expand()
            logits, position = (x.repeat_interleave(GENERATIONS, 0) for x in (logits, positions[:, -1:]))
            attention = torch.cat([attention.repeat_interleave(GENERATIONS, 0), attention.new_ones(rows, LENGTH)], 1)
            completion, uniform = (
                torch.empty(rows, LENGTH, dtype=torch.long, device=DEVICE),
                torch.rand(LENGTH, rows, 1, dtype=torch.float64, device=DEVICE),
            )
            for t in range(LENGTH):
                cumulative = torch.softmax(logits.float(), -1).double().cumsum_(-1)
                token = torch.searchsorted(cumulative, uniform[t] * cumulative[:, -1:]).clamp_(max=logits.shape[-1] - 1)
                completion[:, t : t + 1] = token
                if t + 1 < LENGTH:
                    position = position + 1
                    width = batch.input_ids.shape[1] + t + 1
                    logits = policy(input_ids=token, attention_mask=attention[:, :width], position_ids=position,
                                    past_key_values=cache, logits_to_keep=1).logits[:, -1]  # fmt: skip
            ids = torch.cat([batch.input_ids.repeat_interleave(GENERATIONS, 0), completion], 1)
            score = torch.tensor(reward([], tokenizer.batch_decode(completion, skip_special_tokens=True))).to(DEVICE)
            log_a = fused_log_probs(reference, ids, attention, completion).sum(1)
        log_pi = fused_log_probs(policy, ids, attention, completion).sum(1)
        finish(optimiser, policy, log_pi, log_a, score)
        yield


def fused_log_probs(model: Any, ids: Any, mask: Any, completion: Any) -> Any:
    """By cross_entropy, each prompt read once for all its completions."""
    last = ids.shape[1] - completion.shape[1] - 1  # the last token of a prompt
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    prompts = (x[::GENERATIONS, :last] for x in (ids, mask, positions))
    names = ("input_ids", "attention_mask", "position_ids")
    model.base_model(**dict(zip(names, prompts, strict=True)), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(GENERATIONS)
    rest = (ids[:, last:-1], mask[:, :-1], positions[:, last:-1])
    hidden = model.base_model(
        **dict(zip(names, rest, strict=True)), past_key_values=cache, use_cache=True
    ).last_hidden_state
    logits = model.get_output_embeddings()(hidden)
    return -F.cross_entropy(logits.flatten(0, 1).float(), completion.flatten(), reduction="none").view(completion.shape)


class Turns(TrainerCallback):  # type: ignore[misc]
    """Lets a trainer's thread make one step for each call of `step`."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.done.release()
        self.go.acquire()

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.go.release()
            self.done.acquire()
            yield


def trl(folder: Path, setup: Setup, out: Path, kind: str) -> Iterator[Any]:
    """TRL's trainer with its dearest defaults off: no dropout, no activation checkpointing, no logging, no checkpoints."""
    import trl
    from datasets import Dataset

    prompts = load(folder, setup)[3]
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(out / kind), per_device_train_batch_size=PROMPTS * GENERATIONS, num_generations=GENERATIONS,
        max_completion_length=LENGTH, beta=0.1, learning_rate=RATE, max_steps=100_000, lr_scheduler_type="constant",
        save_strategy="no", logging_strategy="no", report_to="none", use_cpu=DEVICE.type == "cpu", bf16=False,
        gradient_checkpointing=False, disable_dropout=True, disable_tqdm=True, model_init_kwargs={"dtype": setup.dtype},
    )  # fmt: skip
    turns = Turns()
    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(folder), reward_funcs=reward, args=args, callbacks=[turns],
        train_dataset=Dataset.from_list([{"prompt": p} for p in prompts * 50]),
    )  # fmt: skip

    def run() -> None:
        turns.go.acquire()
        trainer.train()

    threading.Thread(target=run, daemon=True).start()
    return iter(turns)


IN_CHUNKS = 256
CONTESTANTS: dict[str, Callable[..., Iterator[Any]]] = {
    "ours": ours,
    "hf_floor": hf_floor,
    "tuned_floor": tuned_floor,
    "trl_grpo": lambda *args: trl(*args, kind="GRPO"),
    "trl_rloo": lambda *args: trl(*args, kind="RLOO"),
}
FOR_PEAK = {
    "ours": ours,
    "chunked": lambda *args: ours(*args, logprob_chunk=IN_CHUNKS),
    "trl_grpo": CONTESTANTS["trl_grpo"],
    "trl_rloo": CONTESTANTS["trl_rloo"],
}


# -- measuring -----------------------------------------------------------------------------------------------------------


def measure(name: str, steps: int, log: Callable[[str], None]) -> dict[str, Any]:
    setup = SETUPS[name]
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "model", Path(place) / "out"
        folder.mkdir()
        setup.make(folder)
        peak = {who: peak_memory(name, who) for who in FOR_PEAK}  # while this process holds no model yet
        running = {who: start(folder, setup, out) for who, start in CONTESTANTS.items()}
        seconds: dict[str, list[tuple[float, float]]] = {who: [] for who in running}
        for turn in range(steps + 2):
            for who, iterator in running.items():
                wall, cpu = clock(), time.process_time()
                next(iterator)
                if turn >= 2:  # two to warm up
                    seconds[who].append((time.process_time() - cpu, clock() - wall))
    cpu, wall = ({who: [pair[i] for pair in pairs] for who, pairs in seconds.items()} for i in (0, 1))
    judged = cpu if DEVICE.type == "cpu" else wall
    median = {who: statistics.median(values) for who, values in judged.items()}
    log(f"\n{name}: {PROMPTS} × {GENERATIONS} completions of {LENGTH} tokens, {setup.dtype}; {steps} steps each\n")
    log(f"{'':12} {'CPU s' if judged is cpu else 'wall s':>8} {'least':>8} {'most':>8} "
        f"{'wall s' if judged is cpu else 'CPU s':>8} {'of HF floor':>12} {'peak MB':>8}")  # fmt: skip
    other = wall if judged is cpu else cpu
    for who, values in judged.items():
        log(f"{who:12} {median[who]:8.3f} {min(values):8.3f} {max(values):8.3f} {statistics.median(other[who]):8.3f} "
            f"{median[who] / median['hf_floor']:12.3f} {peak.get(who, float('nan')):8.0f}")  # fmt: skip

    log(f"{'chunked':12} {'with policy.logprob_chunk=' + str(IN_CHUNKS):>48} {peak['chunked']:8.0f}")

    def ratio(a: str, b: str) -> float:
        """The median of the ratios of neighbours in time, which drift less than their medians."""
        return statistics.median(x / y for x, y in zip(judged[a], judged[b], strict=True))

    return {
        "over_hf_floor": round(ratio("ours", "hf_floor"), 3),
        "over_tuned_floor": round(ratio("ours", "tuned_floor"), 3),
        "trl_best_over_ours": round(min(ratio(who, "ours") for who in ("trl_grpo", "trl_rloo")), 3),
        "peak_mb": round(peak["ours"]),
        "chunked_peak_mb": round(peak["chunked"]),
        "trl_peak_mb": round(min(peak["trl_grpo"], peak["trl_rloo"])),
    }


def peak_memory(name: str, who: str) -> float:
    """MB of a process that makes three steps, less what it had before the model was loaded."""
    command = [sys.executable, __file__, "--model", name, "--prompts", str(PROMPTS), "--peak-of", who]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{who}: {done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def clock() -> float:
    """Wall time, of a GPU too."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident(key: str) -> float:
    """MB of this process's memory now (VmRSS) or at most (VmHWM); getrusage would count what the parent had, too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def peak_here(name: str, who: str) -> None:
    import trl  # noqa: F401  # every process has loaded the same libraries

    from rlhf_fdiv.stages import policy  # noqa: F401

    setup = SETUPS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        folder.mkdir()
        if os.fork() == 0:  # so that making the model does not count
            setup.make(folder)
            os._exit(0)
        os.wait()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        running = FOR_PEAK[who](folder, setup, Path(place) / "out")
        for _ in range(3):
            next(running)
        on_gpu = DEVICE.type == "cuda"
        print(torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident("VmHWM") - before, flush=True)
        os._exit(0)  # a trainer's thread is in the middle of its run


def main() -> None:
    global PROMPTS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SETUPS, action="append", help="only this one; may be repeated")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each contestant")
    parser.add_argument(
        "--prompts", type=int, default=PROMPTS, help=f"prompts a step, of {GENERATIONS} completions each"
    )
    parser.add_argument(
        "--json", action="store_true", help="the tables go to stderr, and the last line of stdout is JSON"
    )
    parser.add_argument("--peak-of", choices=FOR_PEAK, help=argparse.SUPPRESS)
    args = parser.parse_args()
    PROMPTS = args.prompts
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    if args.peak_of:
        peak_here(args.model[0], args.peak_of)
    out = sys.stderr if args.json else sys.stdout
    results = {
        name: measure(name, args.steps, lambda line: print(line, file=out, flush=True)) for name in args.model or SETUPS
    }
    print(json.dumps(results), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
