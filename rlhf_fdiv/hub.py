"""Pushing a run's model to the hub that huggingface_hub is pointed at (`HF_ENDPOINT`)."""

from __future__ import annotations

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.tracking import RunFolder, is_finished


def is_repo(name: str) -> bool:
    """Whether a hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_push(repo: str) -> None:
    """Raises UserError where a push could only fail, before hours of training."""
    if repo.count("/") != 1 or not is_repo(repo):
        raise UserError(f"push_to_hub: {repo!r} names no repository: write owner/name, in letters, digits and . _ -")
    if is_offline_mode():
        raise UserError("push_to_hub: HF_HUB_OFFLINE is set: unset it, or leave push_to_hub out")
    if get_token() is None:
        raise UserError("push_to_hub: no token of the hub here: run `hf auth login`, or set HF_TOKEN")


def push(config: RunConfig, folder: RunFolder) -> str:
    """Uploads what the run has trained, its SFT model where that is all; returns what was done, in words.

    Raises UserError, with the command that does it by hand, where hub or network refuse; the model stays what it is.
    """
    finished = [stage for stage in ("sft", config.objective.stage) if is_finished(folder.stage(stage))]
    if not finished:
        return "push_to_hub: no language model of this run is finished yet, so nothing is pushed"
    model, repo, private = folder.stage(finished[-1]) / "model", str(config.push_to_hub), config.hub_private_repo
    try:
        HfApi().create_repo(repo, private=private, exist_ok=True)
        done = HfApi().upload_folder(
            repo_id=repo,
            folder_path=model,
            commit_message=f"{finished[-1]} stage of {config.name}",
            ignore_patterns="*.bin",  # the trainer's pickled arguments
        )
    except Exception as error:  # of the network, the hub, its storage or the file system: of many kinds
        cause = " ".join(f"{error} {error.__cause__ or ''}".split()).replace(get_token() or "\0", "…")
        raise UserError(
            f"push_to_hub: {repo} did not take the model ({cause}). It is in {model}: the same command pushes it and runs "
            f"nothing again, or: hf upload {repo} {model} .{' --private' if private else ''}"
        ) from error
    return f"push_to_hub: {model} is at {done.repo_url}"
