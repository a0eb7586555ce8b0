"""Supervised fine-tuning by TRL, with its loss from the divergence module.

accelerate launch -m rlhf_fdiv.stages.sft CONFIG [a.b=value …]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from rlhf_fdiv import divergences
from rlhf_fdiv.chat import encode_prompts, stop_ids
from rlhf_fdiv.checkpoints import newest_checkpoint, step_of
from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.data import COMPLETIONS, read_rows, tokenize_completions
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.models import context_length, load_causal_lm, load_tokenizer
from rlhf_fdiv.objectives import next_token_divergence
from rlhf_fdiv.stages.common import require_rows, run_stage, trainer_arguments, training_by_trl
from rlhf_fdiv.stages.stopping import StopCallback, stop
from rlhf_fdiv.tracking import Metrics, RunFolder
from rlhf_fdiv.weights import require_finite


class DivergenceSFTTrainer(SFTTrainer):
    """SFTTrainer whose loss by token is D_f(π ‖ δ_y); forward KL is its ordinary cross-entropy."""

    divergence: divergences.Divergence

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)  # TRL's head: log-probs without the whole logits
        loss = (next_token_divergence(self.divergence, outputs.log_probs) * outputs.label_mask).sum()
        loss = loss / (outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = (
                loss * self.accelerator.num_processes
            )  # the count is that of all processes, whose gradients DDP averages
        return (loss, outputs) if return_outputs else loss


class MetricsCallback(TrainerCallback):
    """Writes what a TRL trainer logs into a `Metrics` of these arguments, which the main process alone may open."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.metrics: Metrics | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.metrics = Metrics(*self.arguments) if state.is_world_process_zero else None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.metrics is not None:
            self.metrics.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.metrics is not None and logs:
            self.metrics.log(state.global_step, {k: float(v) for k, v in logs.items() if isinstance(v, int | float)})


def main(config: RunConfig, folder: RunFolder, out: Path) -> None:
    """Trains on prompt/completion rows, loss on the completion, and writes `model/` into `out`."""
    options, source = config.sft, str(config.data.sft_train)
    rows = read_rows(source, COMPLETIONS)
    name = config.model.name_or_path
    tokenizer = load_tokenizer(name)
    args = trainer_arguments(
        SFTConfig,
        "sft",
        options,
        config,
        out,
        max_length=min(options.max_length, context_length(name)),
        completion_only_loss=True,
    )
    prompts, texts = ([row[k] for row in rows] for k in COMPLETIONS)
    ids = encode_prompts(prompts, tokenizer), tokenize_completions(prompts, texts, tokenizer, args.max_length)
    columns = [{"input_ids": x + y, "completion_mask": [0] * len(x) + [1] * len(y)} for x, y in zip(*ids, strict=True)]
    model = load_causal_lm(name, config.model)
    model.generation_config.eos_token_id = stop_ids(tokenizer)  # type: ignore[union-attr]
    data = Dataset.from_list(columns)
    with training_by_trl("sft", options):
        trainer = DivergenceSFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)  # type: ignore[arg-type]
    require_rows(trainer, source, "sft")
    zero = trainer.accelerator.deepspeed_plugin
    if zero and zero.zero_stage == 3 and not zero.zero3_save_16bit_model:
        raise UserError(
            "launch: sft under ZeRO-3 needs zero3_save_16bit_model: true in the config of accelerate; it would leave shards"
        )
    trainer.divergence = divergences.get(options.divergence)
    checkpoint = newest_checkpoint(out)
    trainer.add_callback(MetricsCallback(out, config.report_to, step_of(checkpoint) if checkpoint else 0))
    trainer.add_callback(until := StopCallback())
    with training_by_trl("sft", options):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if until.stopped:
        stop(f"sft: stopped; {newest_checkpoint(out)} is saved")
    require_finite(str(out / "model"), model)
    trainer.save_model(str(out / "model"))
    tokenizer.save_pretrained(out / "model")


if __name__ == "__main__":
    run_stage("sft")
