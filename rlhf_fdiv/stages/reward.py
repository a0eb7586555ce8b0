"""A reward model from human preferences, its loss the Bernoulli divergence of model and raters.

accelerate launch -m rlhf_fdiv.stages.reward CONFIG [a.b=value …]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from rlhf_fdiv import divergences
from rlhf_fdiv.chat import encode_whole
from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.data import PREFERENCES, Rows, rater_shares, read_rows
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.objectives import preference_divergence, soft_labels
from rlhf_fdiv.reward_models import HeadReward, HiddenStates, fit_head, load_reward_model
from rlhf_fdiv.stages.common import process_state, require_rows, run_stage, trainer_arguments, training_by_trl
from rlhf_fdiv.stages.sft import MetricsCallback
from rlhf_fdiv.tracking import Metrics, RunFolder, write_atomically


def main(config: RunConfig, folder: RunFolder, out: Path) -> None:
    """Fits the reward model, writes `model/` and, where held-out pairs are given, `accuracy.json` into `out`."""
    options = config.reward
    rows = read_rows(str(config.data.preferences_train), PREFERENCES, options.max_pairs)
    held_out = read_rows(config.data.preferences_eval, PREFERENCES) if config.data.preferences_eval else []
    f = divergences.get(options.divergence)
    preference = soft_labels(rater_shares(rows), options.label_smoothing)
    certain = int(((preference == 0) | (preference == 1)).sum())
    if certain and f.f_prime_at_infinity == float("inf"):
        raise UserError(
            f"reward.divergence: {divergences.label(f)} is infinite on the {certain} pairs whose raters all agree "
            "(f'(∞) = ∞): set reward.label_smoothing=0.05, or use forward_kl, js, tv, hellinger or alpha < 1"
        )
    state = process_state()
    if options.method == "finetune":
        fine_tune(config, rows, preference, f, out)
    elif state.is_main_process:
        fit_on_hidden_states(config, rows, preference, f, out, state.device)
    state.wait_for_everyone()
    if held_out and state.is_main_process:
        model = load_reward_model(str(out / "model"), state.device)
        report = accuracy(model, held_out, options.batch_size)
        write_atomically(out / "accuracy.json", json.dumps(report, indent=2))
        print("held-out pairs: " + ", ".join(f"{k} {v:.3f}" for k, v in report.items()))


def fit_on_hidden_states(
    config: RunConfig, rows: Rows, preference: Tensor, f: divergences.Divergence, out: Path, device: torch.device
) -> None:
    """The fast option: hidden states once for each text, then a convex fit of seconds (convex for forward KL)."""
    options = config.reward
    states = HiddenStates(config.model.name_or_path, config.model.dtype, options.layers, device)
    pairs = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    texts = {repr(pair): pair for pair in pairs}
    features = states([p for p, _ in texts.values()], [c for _, c in texts.values()], options.batch_size)
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    features = (features - mean) / std
    place = {key: i for i, key in enumerate(texts)}
    first, second = torch.tensor([place[repr(pair)] for pair in pairs]).chunk(2)
    difference = features[first] - features[second]
    weight = fit_head(f, difference, preference, options.l2)
    backbone = {"backbone": config.model.name_or_path, "dtype": config.model.dtype, "layers": options.layers}
    HeadReward(states, {**backbone, "pairs": len(rows), "texts": len(texts)}, weight, mean, std).save(out / "model")
    metrics = Metrics(out, config.report_to)
    metrics.log(1, {"loss": float(preference_divergence(f, difference @ weight, preference).mean())})
    metrics.close()


def fine_tune(config: RunConfig, rows: Rows, preference: Tensor, f: divergences.Divergence, out: Path) -> None:
    """TRL's RewardTrainer with this loss; the raters' share travels in its `margin` column, the one number it carries."""
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    from rlhf_fdiv.models import load_tokenizer
    from rlhf_fdiv.weights import from_safetensors

    class DivergenceRewardTrainer(RewardTrainer):
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            share = inputs.pop("margin")
            outputs = model(**inputs, use_cache=False)
            chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)
            loss = preference_divergence(f, chosen - rejected, share).mean()
            return (loss, outputs) if return_outputs else loss

    tokenizer = load_tokenizer(config.model.name_or_path)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"model {config.model.name_or_path}: pad and EOS are the same token, so the classifier could not tell where a "
            "text ends. Give its tokenizer a pad token of its own, or use reward.method=head"
        )
    options: dict[str, Any] = {"num_labels": 1, "dtype": torch.float32, "new_head": True}
    model = from_safetensors(AutoModelForSequenceClassification, config.model.name_or_path, **options)
    model.config.pad_token_id = tokenizer.pad_token_id
    args = trainer_arguments(RewardConfig, "reward", config.reward, config, out, max_length=config.reward.max_length)
    prompts, *sides = ([row[k] for row in rows] for k in PREFERENCES)
    chosen, rejected = (encode_whole(prompts, texts, tokenizer) for texts in sides)
    data = Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected, "margin": preference.tolist()})
    with training_by_trl("reward", config.reward):
        trainer = DivergenceRewardTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    require_rows(trainer, str(config.data.preferences_train), "reward")
    trainer.add_callback(MetricsCallback(out, config.report_to))
    with training_by_trl("reward", config.reward):
        trainer.train()
    trainer.save_model(str(out / "model"))
    tokenizer.save_pretrained(out / "model")


def accuracy(model: Any, rows: Rows, batch_size: int) -> dict[str, float]:
    """The share of held-out pairs that the model orders as the raters do."""
    scores = [
        model.score([r["prompt"] for r in rows], [r[side] for r in rows], batch_size) for side in ("chosen", "rejected")
    ]
    return agreement(torch.tensor(scores[0]) - torch.tensor(scores[1]), rows)


def rightness(margin: Tensor, shares: Tensor) -> Tensor:
    """1 where a margin, chosen over rejected, is on the side of most raters, ½ where it is 0; [N]."""
    return torch.heaviside(torch.where(shares >= 0.5, margin, -margin), margin.new_tensor(0.5))


def agreement(margin: Tensor, rows: Rows) -> dict[str, float]:
    """The share of pairs whose margin, chosen over rejected, [N], is on the side of most raters: of all, and of those more
    than 1 apart."""
    right = rightness(margin, rater_shares(rows).to(margin))
    report = {"accuracy": float(right.mean()), "pairs": float(len(rows))}
    apart = torch.tensor([abs(float(row.get("margin") or 0)) > 1 for row in rows])
    if apart.any():
        report |= {
            "accuracy_more_than_1_apart": float(right[apart].mean()),
            "pairs_more_than_1_apart": float(apart.sum()),
        }
    return report


if __name__ == "__main__":
    run_stage("reward")
