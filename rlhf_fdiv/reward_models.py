"""Reward models: a linear head on frozen hidden states (fast on a CPU), or a fine-tuned sequence classifier."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from rlhf_fdiv.chat import Prompt, encode_prompts, encode_whole, end_id
from rlhf_fdiv.divergences import Divergence
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.known_models import resolve_model
from rlhf_fdiv.models import load_tokenizer
from rlhf_fdiv.objectives import preference_divergence
from rlhf_fdiv.sequences import pad
from rlhf_fdiv.weights import NO_MODEL, from_safetensors, readable


class HiddenStates:
    """Hidden states of a frozen model, averaged over the completion's tokens, from a few layers side by side.

    Layers above the last one asked for are never loaded. `layers` are fractions of the depth, 0 < layer ≤ 1.
    """

    def __init__(self, name_or_path: str, dtype: str, layers: list[float], device: torch.device) -> None:
        path = resolve_model(name_or_path)
        config = AutoConfig.from_pretrained(path)
        self.layers = [max(1, round(fraction * config.num_hidden_layers)) for fraction in layers]
        config.num_hidden_layers = max(self.layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        self.tokenizer = load_tokenizer(name_or_path)
        model = from_safetensors(AutoModel, name_or_path, config=config, dtype=getattr(torch, dtype))
        self.model = model.to(device)

    def __call__(self, prompts: list[Prompt], completions: list[str], batch_size: int) -> Tensor:
        """[N, layers × hidden] in float32."""
        return completion_states(self.model, self.tokenizer, self.layers, prompts, completions, batch_size)


def completion_states(
    model: Any,
    tokenizer: Any,
    layers: list[int],
    prompts: list[Prompt],
    completions: list[str],
    batch_size: int,
    max_length: int | None = None,
) -> Tensor:
    """Hidden states of some layers side by side, averaged over each completion's tokens and what ends it.

    [N, layers × hidden] in float32. Completions are cut at `max_length`.
    """
    first, end = encode_prompts(prompts, tokenizer), end_id(prompts, tokenizer)
    ids = tokenizer(completions, add_special_tokens=False)["input_ids"]
    behind = [[*row[:max_length], end] for row in ids]
    features = torch.zeros(len(behind), len(layers) * model.config.hidden_size)
    for rows, states, own in token_states(model, layers, first, behind, batch_size):
        own = own.unsqueeze(-1)
        features[rows] = ((states * own).sum(1) / own.sum(1)).cpu()
    return features


@torch.no_grad()
def token_states(
    model: Any, layers: list[int], prompts: list[list[int]], completions: list[list[int]], batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Hidden states of some layers side by side, [b, W, layers × hidden] in float32, and which of them are the completion's,
    [b, W], for some rows of the token ids at a time: rows of like length, so that little is padded."""
    whole = [[*a, *b] for a, b in zip(prompts, completions, strict=True)]
    order = sorted(range(len(whole)), key=lambda i: len(whole[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        tokens, mask = (x.to(model.device) for x in pad([whole[i] for i in rows], 0, "right"))
        deep = layers != [-1]  # all layers' states would be kept for the sake of the last
        out = model(input_ids=tokens, attention_mask=mask, output_hidden_states=deep, use_cache=False)
        states = [out.hidden_states[layer] for layer in layers] if deep else [out.last_hidden_state]
        first = torch.tensor([len(prompts[i]) for i in rows], device=mask.device)
        own = mask * (torch.arange(mask.shape[1], device=mask.device) >= first[:, None])
        yield rows, torch.cat([x.float() for x in states], -1), own


@dataclass
class HeadReward:
    """r(x, y) = w·(φ(x, y) − mean)/std, φ from `HiddenStates`; zero on average over the texts it was trained on."""

    states: HiddenStates
    config: dict[str, Any]
    weight: Tensor  # [D]
    mean: Tensor  # [D]
    std: Tensor  # [D]
    tokenizer = property(lambda self: self.states.tokenizer)
    base_model = property(lambda self: self.states.model)
    layers = property(lambda self: self.states.layers)
    head = property(lambda self: self.weight)

    def score(self, prompts: list[Prompt], completions: list[str], batch_size: int) -> list[float]:
        features = self.states(prompts, completions, batch_size)
        return (((features - self.mean) / self.std) @ self.weight).tolist()

    def by_token(self, states: Tensor, own: Tensor) -> Tensor:
        """The score of the tokens so far, without what would end them; 0, the mean, of none."""
        weight, mean, std = (x.to(states.device) for x in (self.weight, self.mean, self.std))
        return ((((states - mean) / std) @ weight) * own).cumsum(1) / own.cumsum(1).clamp(min=1)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weight": self.weight, "mean": self.mean, "std": self.std}, folder / "head.safetensors")
        (folder / "reward_config.json").write_text(json.dumps(self.config, indent=2), encoding="utf-8")


def fit_head(f: Divergence, difference: Tensor, preference: Tensor, l2: float) -> Tensor:
    """w minimising mean D_f(σ(w·Δφ) ‖ c) + ½·l2·|w|²/N by L-BFGS; Δφ [N, D], c [N] → [D] in float32."""
    x, c = difference.double(), preference.double()
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = preference_divergence(f, x @ w, c).mean() + l2 / (2 * len(x)) * (w @ w)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    if not bool(w.isfinite().all()):
        raise UserError("reward: the head's fit did not stay finite; raise reward.l2 or set reward.label_smoothing")
    return w.detach().float()


class ClassifierReward:
    """Any sequence classifier with one label, such as TRL's RewardTrainer makes."""

    layers: ClassVar[list[int]] = [-1]
    base_model = property(lambda self: self.model.base_model)
    head = property(lambda self: getattr(self.model, "score", None))  # which encoders do not have

    def __init__(self, path: str, device: torch.device) -> None:
        self.tokenizer = _classifier_tokenizer(path)
        self.model = from_safetensors(AutoModelForSequenceClassification, path, dtype="auto").to(device)
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.no_grad()
    def score(self, prompts: list[Prompt], completions: list[str], batch_size: int) -> list[float]:
        ids = encode_whole(prompts, completions, self.tokenizer)
        scores: list[float] = []
        for start in range(0, len(ids), batch_size):
            part = pad(ids[start : start + batch_size], self.tokenizer.pad_token_id, "right")
            tokens, mask = (x.to(self.model.device) for x in part)
            scores += self.model(input_ids=tokens, attention_mask=mask).logits.squeeze(-1).float().tolist()
        return scores

    def by_token(self, states: Tensor, own: Tensor) -> Tensor:
        """The score at each token."""
        return self.head(states.to(self.model.dtype)).squeeze(-1).float()


class Judge:
    """A reward model as a scorer, which has read every prefix of a completion when it has read the completion."""

    def __init__(self, path: str, device: torch.device, batch_size: int) -> None:
        self.model, self.batch_size = load_reward_model(path, device), batch_size

    def __call__(self, prompts: list[Prompt], completions: list[str], **columns: Any) -> list[float]:
        return self.model.score(prompts, completions, self.batch_size)

    @torch.no_grad()
    def of_prefixes(self, tokenizer: Any, prompts: list[Prompt], completions: list[list[int]]) -> list[float] | None:
        """What it says of each completion before each of its tokens, one completion after the other; None where these tokens
        are not its own, or their states would tell what follows."""
        if not (_same_vocabulary(tokenizer, self.model.tokenizer) and self.reads_forward):
            return None
        model, found = self.model, dict[int, list[float]]()
        # the policy's vocabulary may be padded further
        last = model.base_model.get_input_embeddings().num_embeddings - 1
        known = [[min(token, last) for token in row] for row in completions]
        texts = encode_prompts(prompts, model.tokenizer), known
        for rows, states, own in token_states(model.base_model, model.layers, *texts, self.batch_size):
            before = F.pad(model.by_token(states, own), (1, -1))  # a prefix has the score of its last token
            found |= {i: x[mine].tolist() for i, x, mine in zip(rows, before, own.bool(), strict=True)}
        return list(itertools.chain.from_iterable(found[i] for i in range(len(completions))))

    @functools.cached_property
    def reads_forward(self) -> bool:
        """Whether states depend on what stands before them alone; found out, since configs have many words for it."""
        base = self.model.base_model
        texts = torch.tensor([[1, 2, 3], [1, 2, 4]], device=base.device) % base.get_input_embeddings().num_embeddings
        if self.model.head is None:
            return False
        try:
            states = base(input_ids=texts, attention_mask=torch.ones_like(texts)).last_hidden_state[:, :2]
        except (TypeError, ValueError):  # of an encoder–decoder
            return False
        return bool(torch.allclose(states[0].float(), states[1].float(), rtol=1e-3, atol=1e-3))


@functools.cache
def _same_vocabulary(one: Any, other: Any) -> bool:
    return bool(one.get_vocab() == other.get_vocab())


def check_reward_model(path: str, prompts: list[Prompt]) -> None:
    """Raises UserError, before any weight is read, where no reward model is at `path`, or one that cannot read these."""
    if not is_reward_folder(path):
        tokenizer = _classifier_tokenizer(path)
        for prompt in prompts:
            encode_whole([prompt], ["an answer"], tokenizer)


def _classifier_tokenizer(path: str) -> Any:
    tokenizer = load_tokenizer(path)
    with readable(path, NO_MODEL):
        config = AutoConfig.from_pretrained(resolve_model(path))
    if config.num_labels != 1:
        kind = (config.architectures or [config.model_type])[0]
        raise UserError(f"{path}: a reward model classifies with one label, this {kind} has {config.num_labels}")
    return tokenizer


def is_reward_folder(path: str) -> bool:
    """Whether a folder was made by the reward stage's fast option."""
    return (Path(path) / "reward_config.json").is_file()


def load_reward_model(path: str, device: torch.device) -> HeadReward | ClassifierReward:
    """From the folder of either kind, or a hub name of the second."""
    if not is_reward_folder(path):
        return ClassifierReward(path, device)
    with readable(path, "no reward model there that can be read"):
        config = json.loads((Path(path) / "reward_config.json").read_text(encoding="utf-8"))
        states = HiddenStates(config["backbone"], config["dtype"], config["layers"], device)
        return HeadReward(states, config, **load_file(Path(path) / "head.safetensors"))
