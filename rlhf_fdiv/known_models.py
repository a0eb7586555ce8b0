"""Models that have a name of their own because no hub is needed for them."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_fdiv import assets, film_reviews

SMOLLM2_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what smollm2-135m is on the hub


def resolve_model(name: str) -> str:
    """A name or path that `from_pretrained` takes: "smollm2-135m", "toy" and "reviews-gpt2" become their cached folders, all
    else stays."""
    made = {"smollm2-135m": assets.smollm2_135m, "toy": assets.toy, "reviews-gpt2": reviews_gpt2}.get(name)
    return name if made is None else str(made())


def reviews_gpt2() -> Path:
    """An untrained GPT-2 of .7 M parameters whose 2,048 tokens are fitted to the film reviews that SFT trains on."""
    return assets.build_once(assets.cache_dir() / "reviews-gpt2-v1", _build)


def _build(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    with (film_reviews.build() / "sft_train.jsonl").open(encoding="utf-8") as lines:
        texts = [row["prompt"] + row["completion"] for row in map(json.loads, lines)]
    bpe, special = Tokenizer(models.BPE()), ["<|endoftext|>", "<|pad|>"]
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    assets.save_random_gpt2(folder, bpe, *special, n_embd=128, n_layer=2, n_head=4, n_positions=128)
