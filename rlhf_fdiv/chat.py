"""Prompts are text or messages, `[{"role": …, "content": …}, …]`. Here both become tokens, and here is said what ends a
completion; elsewhere they are handed on as they are."""

from __future__ import annotations

import contextlib
from typing import Any

from jinja2 import TemplateError

from rlhf_fdiv.errors import UserError

Prompt = str | list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")


def is_chat(prompts: list[Prompt]) -> bool:
    """Whether prompts, all of one kind, are messages."""
    return bool(prompts) and not isinstance(prompts[0], str)


def shown(prompt: Prompt) -> str:
    """As a person reads it: text as it is, messages one under the other, each behind its role."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def answers(completions: list[str]) -> list[list[dict[str, str]]]:
    """Completions as messages of the assistant, as TRL hands them to reward functions."""
    return [[{"role": "assistant", "content": text}] for text in completions]


def encode_prompts(prompts: list[Prompt], tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts. Messages go through the tokenizer's chat template, up to where the assistant's answer begins.

    Raises UserError where it has no template, or one that refuses them.
    """
    return _with_template(prompts, tokenizer, True) if is_chat(prompts) else tokenizer(prompts)["input_ids"]


def encode_whole(prompts: list[Prompt], completions: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts with their completions, as TRL's RewardTrainer and the hub's reward models read them: text and
    EOS, or the whole conversation as the template writes it."""
    if not is_chat(prompts):
        return tokenizer([f"{p}{c}{tokenizer.eos_token}" for p, c in zip(prompts, completions, strict=True)])[
            "input_ids"
        ]
    conversations = [[*p, *a] for p, a in zip(prompts, answers(completions), strict=True)]
    return _with_template(conversations, tokenizer, False)


def _with_template(conversations: list[Any], tokenizer: Any, add_generation_prompt: bool) -> list[list[int]]:
    if not tokenizer.chat_template:
        raise UserError(
            f"the prompts are messages, and the tokenizer of {tokenizer.name_or_path} has no chat template: set "
            "tokenizer.chat_template to the one that its model was trained with and save_pretrained it, or write the prompts "
            "as text"
        )
    ids = []
    for i, messages in enumerate(conversations, 1):
        try:  # the template writes BOS itself, and the tokenizer adds none to it
            out = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=True)
        except TemplateError as error:
            raise UserError(f"row {i}: the chat template of {tokenizer.name_or_path} refuses it: {error}") from error
        ids.append(out["input_ids"])
    return ids


def end_id(prompts: list[Prompt], tokenizer: Any) -> int:
    """The token that training writes behind a completion: the end of an assistant's turn, or EOS behind text."""
    return end_of_turn(tokenizer) if is_chat(prompts) else tokenizer.eos_token_id


def end_of_turn(tokenizer: Any) -> int:
    """The first special token that the chat template writes behind an assistant's message; EOS where there is none."""
    mark, behind = "an answer", list[int]()
    if tokenizer.chat_template:
        with contextlib.suppress(TemplateError):  # which encode_prompts tells, where there are messages
            turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": mark}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            behind = tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    return next((i for i in behind if is_special(i, tokenizer)), tokenizer.eos_token_id)


def is_special(token_id: int, tokenizer: Any) -> bool:
    return token_id in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[token_id].special


def stop_ids(tokenizer: Any) -> list[int]:
    """Every token that ends a completion, as `load_tokenizer` found them; EOS alone for another tokenizer."""
    return getattr(tokenizer, "stop_ids", None) or [tokenizer.eos_token_id]
