"""The typed sections of a config. Field names are those of `TrainingArguments` wherever they mean the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le, Lt, MinLen
from pydantic import Field

from rlhf_fdiv import divergences
from rlhf_fdiv.model_options import ModelOptions
from rlhf_fdiv.ranges import BelowHalf, BelowOne, Count, CountOrZero, NotNegative, Number, Positive, Steps

STAGES = ("sft", "reward", "policy", "prefer", "distil", "evaluate")
Scheduler = Literal["constant", "constant_with_warmup", "linear", "cosine"]


@dataclass(frozen=True)
class DataOptions:
    """A file, a saved `datasets` folder or a hub name for each use; `film_reviews/…` is made on first use."""

    sft_train: Annotated[str, MinLen(1)] | None = None
    sft_eval: Annotated[str, MinLen(1)] | None = None
    preferences_train: Annotated[str, MinLen(1)] | None = None
    preferences_eval: Annotated[str, MinLen(1)] | None = None
    prompts_train: Annotated[str, MinLen(1)] | None = None
    prompts_eval: Annotated[str, MinLen(1)] | None = None


@dataclass(frozen=True)
class SftOptions:
    """Supervised fine-tuning by TRL's SFTTrainer; `training_args` takes any other field of its SFTConfig."""

    divergence: Any = field(default_factory=lambda: {"name": "forward_kl"})
    max_steps: Steps = -1
    num_train_epochs: Positive = 1.0
    per_device_train_batch_size: Count = 16
    gradient_accumulation_steps: Count = 1
    learning_rate: Positive = 1e-4
    lr_scheduler_type: Scheduler = "linear"
    warmup_steps: NotNegative = 0.1
    max_length: Count = 128
    save_steps: CountOrZero = 0
    training_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardOptions:
    """A reward model from pairs. `method: head` fits a linear head on frozen hidden states, in minutes on a CPU;
    `method: finetune` is TRL's RewardTrainer, whose other fields go into `training_args`."""

    method: Literal["head", "finetune"] = "head"
    divergence: Any = field(default_factory=lambda: {"name": "forward_kl"})
    label_smoothing: BelowHalf = 0.0
    max_pairs: Count | None = None
    layers: Annotated[list[Annotated[Number, Gt(0), Le(1)]], MinLen(1)] = field(default_factory=lambda: [0.4, 0.6])
    l2: NotNegative = 1000.0
    batch_size: Count = 64
    max_steps: Steps = -1
    num_train_epochs: Positive = 1.0
    per_device_train_batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    learning_rate: Positive = 2e-5
    max_length: Count = 256
    training_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingOptions:
    """What every training loop of our own takes; `model` is where it starts, by default the run's SFT model."""

    model: Annotated[str, MinLen(1)] | None = None
    max_steps: Count = 100
    per_device_train_batch_size: Count = 32
    optim: Literal["adamw_torch_fused", "adamw_torch", "sgd"] = "adamw_torch_fused"
    learning_rate: Positive = 1e-5
    lr_scheduler_type: Scheduler = "constant"
    warmup_steps: NotNegative = 0.0  # a share of them below 1
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    save_steps: Count = 50
    save_total_limit: Count = 2

    def __post_init__(self) -> None:
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            raise ValueError("warmup_steps: a constant schedule has none; set lr_scheduler_type: constant_with_warmup")


@dataclass(frozen=True)
class VllmOptions:
    """A server that `vllm serve` runs in development mode. The weights reach it through `folder`, which it must see under
    the same path, by default the stage's own; an answer may take `timeout` seconds."""

    url: Annotated[str, Field(pattern="^https?://")]
    folder: Annotated[str, MinLen(1)] | None = None
    timeout: Positive = 600.0


@dataclass(frozen=True)
class PolicyOptions(TrainingOptions):
    """On-policy training. Each step samples `num_prompts` × `num_generations` completions over all processes and makes one
    optimiser step of them, or one in each epoch and minibatch of the estimator. With `reference_share` > 0 that share is
    sampled from the reference, with `replay_steps` each update also goes over the completions of that many steps before;
    every completion then, and with the engine `vllm`, carries its importance weight π/μ, at most `max_importance_weight`.
    Scores of `logged_scorers` are recorded beside those of the target, and train nothing. With `logprob_chunk` the update
    holds the logits of that many tokens at a time: slower, for large vocabularies that would not fit."""

    num_prompts: Count = 8
    num_generations: Count = 8
    max_completion_length: Count = 32
    engine: Literal["cached", "generate", "vllm"] = "cached"
    vllm: VllmOptions | None = None
    reference_share: BelowOne = 0.0
    max_importance_weight: Positive = 10.0
    replay_steps: CountOrZero = 0
    warm_start_generations: CountOrZero = 0
    logprob_chunk: CountOrZero = 0
    logged_scorers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PreferOptions(TrainingOptions):
    """f-DPO on `data.preferences_train`: each step takes `num_pairs` pairs over all processes. Completions longer than
    `max_completion_length` tokens are cut there. `logprob_chunk` as in PolicyOptions."""

    num_pairs: Count = 16
    max_completion_length: Count = 64
    logprob_chunk: CountOrZero = 0


@dataclass(frozen=True)
class DistilOptions(TrainingOptions):
    """Distillation from `teacher`, which must share the student's vocabulary: on policy from `data.prompts_train`, off
    policy from `data.sft_train`. `chunk` is how many tokens are compared at a time; it bounds the memory beside the
    logits."""

    teacher: Annotated[str, MinLen(1)] | None = None
    num_prompts: Count = 16
    max_completion_length: Count = 32
    chunk: Count = 16


@dataclass(frozen=True)
class EvaluateOptions:
    """Measurement on held-out prompts, of the reference and of the policy with the same random streams; with `exact` also
    over every text, for a language small enough to enumerate. `lm_eval` are tasks of lm-eval, by name or local .yaml file, on
    their first `lm_eval_limit` examples; `mauve` compares samples with the prompts' `references`, or with `data.sft_eval`."""

    num_prompts: Count | None = None
    num_generations: Count = 4
    batch_size: Count = 64
    divergences: list[Any] = field(
        default_factory=lambda: ["reverse_kl", "forward_kl", "js", "tv", "hellinger", "pearson_chi2"]
    )
    perplexity_rows: CountOrZero = 128
    samples: CountOrZero = 10
    exact: bool = False
    lm_eval: list[Annotated[str, MinLen(1)]] = field(default_factory=list)
    lm_eval_limit: Count | None = None
    mauve: bool = False


@dataclass(frozen=True)
class RunConfig:
    """Everything that one run is made of; the fields are the top-level keys of a config file."""

    name: str
    model: ModelOptions
    data: DataOptions
    divergence: dict[str, Any]
    objective: Any
    target: Any
    estimator: Any
    scorers: dict[str, Any]
    sft: SftOptions
    reward: RewardOptions
    policy: PolicyOptions
    prefer: PreferOptions
    distil: DistilOptions
    evaluate: EvaluateOptions
    stages: Annotated[list[Literal[STAGES]], MinLen(1)]  # type: ignore[valid-type]
    seed: Annotated[CountOrZero, Lt(2**32)] = 0
    output_dir: Annotated[str, MinLen(1)] = "runs"
    reuse: Annotated[str, MinLen(1)] | None = None
    resume: Literal[STAGES] | None = None  # type: ignore[valid-type]
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    push_to_hub: Annotated[str, MinLen(1)] | None = None
    hub_private_repo: bool = True

    @property
    def f(self) -> divergences.Divergence:
        return divergences.get(self.divergence)

    @property
    def measured(self) -> list[divergences.Divergence]:
        """The f that evaluation and each training step measure beside the run's own."""
        return [divergences.get(spec) for spec in self.evaluate.divergences]

    @property
    def training(self) -> PolicyOptions | PreferOptions | DistilOptions:
        """The section of the stage that trains for this objective."""
        return getattr(self, self.objective.stage)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def beta(self) -> float:
        """The β of the reported objective E[r] − β·KL: the target's, where the trained objective has no reward of its own."""
        parts = (self.objective, self.target) if self.objective.stage == "policy" else (self.target, self.objective)
        return next((float(part.beta) for part in parts if hasattr(part, "beta")), 1.0)
