"""Rollouts by a vLLM server: it is given the policy's weights before each, then asked for completions over HTTP.

Endpoints and fields are those of vLLM 0.32: `/v1/completions`, and of its development mode `/collective_rpc`, which calls
the workers' `reload_weights(weights_path)`, and `/reset_prefix_cache`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from safetensors import SafetensorError
from torch import Tensor

from rlhf_fdiv.chat import stop_ids
from rlhf_fdiv.checkpoints import what_is_kept
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.models import Policy, merged
from rlhf_fdiv.rollout import Rollout
from rlhf_fdiv.sequences import Sequences, pad
from rlhf_fdiv.stages.training import Mean, Training

T = TypeVar("T")
_AT_ONCE = 64  # requests; the server batches their completions as it can
_OTHER_WEIGHTS = 0.3  # nats a token: ten times what bfloat16 makes
# the whole distribution, whatever the model's generation config says, until what ends a completion here and nothing else
_PLAIN = {
    "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
}  # fmt: skip


class Server:
    """The server that `policy.vllm` names. Whatever goes wrong with it is a UserError, after `timeout` seconds at most."""

    def __init__(self, training: Training, tokenizer: Any) -> None:
        self.training, self.tokenizer, self.options = training, tokenizer, training.options.vllm
        self.model = self._ask("/v1/models", lambda answer: answer["data"][0]["id"])

    def holding(self, policy: Policy) -> Server:
        """Itself, once it has the weights of `policy`; called by all processes together.

        It reads them while it is asked to, so they are whole by then, and not needed after.
        """
        accelerator = self.training.accelerator
        if accelerator.is_main_process:
            folder = Path(self.options.folder or self.training.out).absolute()
            try:
                with tempfile.TemporaryDirectory(prefix=".vllm-", dir=folder) as part:
                    merged(policy.lm).save_pretrained(part)
                    call = {"method": "reload_weights", "kwargs": {"weights_path": part}}
                    self._ask("/collective_rpc", lambda answer: answer["results"], call)
            except (OSError, SafetensorError) as error:
                raise self._failure(f"policy.vllm.folder: the weights cannot be written: {error}") from error
            if not self._ask("/reset_prefix_cache", lambda answer: answer["success"], {}):
                raise self._failure(f"policy.vllm: {self.options.url} is at work for others, on prompts it read before")
        accelerator.wait_for_everyone()
        return self

    def sample(self, prompts: list[list[int]], num_generations: int, noise: Tensor) -> tuple[Sequences, Tensor, Tensor]:
        """As `rollout.sample`. The entropy of a token is −log μ of it: right on average, for μ is what drew it.

        One request a prompt: vLLM gives all prompts of a request one seed, and each completion of a prompt the next.
        """
        stops, length = stop_ids(self.tokenizer), noise.shape[1]

        def ask(i: int) -> list[tuple[list[int], list[float]]]:
            seed = int(noise[i * num_generations, 0] * 2**53)
            what = {"model": self.model, "prompt": prompts[i], "n": num_generations, "max_tokens": length, "seed": seed}
            body = _PLAIN | what | {"stop_token_ids": stops}
            return self._ask("/v1/completions", lambda x: _completions(x, num_generations, length, stops), body)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            drawn = [completion for answer in pool.map(ask, range(len(prompts))) for completion in answer]
        each = [prompt for prompt in prompts for _ in range(num_generations)]
        tokens, mask = pad([ids for ids, _ in drawn], stops[0], "right")
        log_probs = torch.zeros(mask.shape)
        log_probs[mask.bool()] = torch.tensor([x for _, log_probs in drawn for x in log_probs])
        columns = (*pad(each, self.tokenizer.pad_token_id, "left"), tokens, mask, log_probs)
        *ours, log_probs = (x.to(self.training.accelerator.device) for x in columns)
        return Sequences(*ours), log_probs, -log_probs

    def mismatch(self, log_pi: Tensor, batch: Rollout) -> float:
        """Mean |log π − log μ| of all processes' tokens, in nats: what the importance weights make up for.

        Raises UserError where it is so large that the server must hold other weights.
        """
        mean = Mean(self.training)
        mean.add((log_pi - batch.log_probs).abs(), batch.sequences.mask)
        if not (found := mean.of_all()) <= _OTHER_WEIGHTS:
            raise self._failure(
                f"policy.vllm: {self.options.url} and the policy differ by {found:.3g} nats a token: does another run use it?"
            )
        return found

    def _ask(self, path: str, read: Callable[[Any], T], body: dict[str, Any] | None = None) -> T:
        """What `read` finds in the answer to GET, or to POST where there is a `body`."""
        data = None if body is None else json.dumps(body).encode()
        url = self.options.url.rstrip("/") + path
        request = Request(url, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=self.options.timeout) as answer:
                return read(json.loads(answer.read()))
        except HTTPError as error:
            problem = f"answers {error.code}: {error.read(400).decode(errors='replace')}"
        except (OSError, HTTPException) as error:
            why = getattr(error, "reason", error)
            problem = f"does not answer: {why} (policy.vllm.timeout is {self.options.timeout:g} s)"
        except (LookupError, TypeError, ValueError) as error:
            problem = f"does not answer as vLLM 0.32 does: {error!r}"
        raise self._failure(f"policy.vllm: {url} {problem}")

    def _failure(self, problem: str) -> UserError:
        return UserError(
            f"{problem}. Start the server as docs/faster_and_larger.md says, with the model that this run starts from. "
            f"{what_is_kept(self.training.out)}"
        )


def _completions(answer: Any, count: int, length: int, stops: list[int]) -> list[tuple[list[int], list[float]]]:
    """Token ids, an EOS included, and log-probs of each completion. Raises ValueError where one ends otherwise."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    drawn = [(choice["token_ids"], [*map(float, choice["logprobs"]["token_logprobs"])]) for choice in choices]
    for ids, log_probs in drawn:
        if (ids[-1] not in stops and len(ids) != length) or {*stops} & {*ids[:-1]} or len(ids) != len(log_probs):
            raise ValueError(f"a completion of {len(ids)} tokens that ends neither with EOS nor at {length}: {ids}")
    if len(drawn) != count:
        raise ValueError(f"{len(drawn)} completions in place of {count}")
    return drawn
