"""What others measure with: lm-eval's tasks on a loaded model, and MAUVE of given features. Both packages are optional."""

from __future__ import annotations

import functools
import importlib.util
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_fdiv.errors import UserError, told_as

MAUVE_TEXTS = 500  # of each side, below which its authors do not trust it


def require_harness(tasks: list[str], mauve: bool) -> None:
    """Raises UserError for a package that is missing, and for a task that lm-eval cannot load."""
    for module, key, wanted in (("lm_eval", "lm_eval", tasks), ("mauve", "mauve", mauve)):
        if wanted and importlib.util.find_spec(module) is None:
            raise UserError(f"evaluate.{key}: needs the package {module}: pip install 'rlhf_fdiv[eval]'")
    if tasks:
        task_manager(tuple(tasks))


@functools.cache
def task_manager(tasks: tuple[str, ...]) -> Any:
    """lm-eval's, once it has loaded each task with its data: a registered name, or a local file where it ends with .yaml."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    local = [task.endswith(".yaml") for task in tasks]
    manager = TaskManager(include_defaults=not all(local))  # reading lm-eval's own thousands takes half a minute
    for task, is_file in zip(tasks, local, strict=True):
        if is_file and not Path(task).is_file():
            raise UserError(f"evaluate.lm_eval: {task}: no such task file")
        if not is_file and task not in manager.all_tasks:
            raise UserError(f"evaluate.lm_eval: lm-eval has no task {task!r}; `lm-eval ls tasks` lists them")
        with told_as(
            f"evaluate.lm_eval: {task} cannot be loaded"
        ):  # a user's task file, or a data set that is not here
            manager.load([task])
    return manager


def lm_eval(
    lm: Any, tokenizer: Any, tasks: list[str], limit: int | None, batch_size: int, seed: int
) -> dict[str, float]:
    """`task.metric` and its standard error `task.metric_se`, of the first `limit` examples of each task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    seeds = {f"{name}_seed": seed for name in ("random", "numpy_random", "torch_random", "fewshot_random")}
    results = simple_evaluate(
        HFLM(pretrained=lm, tokenizer=tokenizer, batch_size=batch_size), tasks=tasks, limit=limit, log_samples=False,
        bootstrap_iters=1000, task_manager=task_manager(tuple(tasks)), **seeds,
    )  # fmt: skip
    figures = {}
    for task, values in results["results"].items():
        for key, value in values.items():  # "acc,none" and "acc_stderr,none"; "N/A" where there is no error
            metric, _, answer = key.partition(",")
            name = f"{task}.{metric.removesuffix('_stderr')}" + (f".{answer}" if answer not in ("", "none") else "")
            if answer and isinstance(value, int | float):
                figures[name + ("_se" if metric.endswith("_stderr") else "")] = float(value)
    return figures


def mauve(references: Tensor, samples: Tensor, seed: int) -> float:
    """MAUVE (0–1, 1 for the same distribution, arXiv 2102.01454) of two sets of features, [N, D] and [M, D]."""
    from mauve import compute_mauve

    return float(compute_mauve(p_features=references.numpy(), q_features=samples.numpy(), seed=seed + 1).mauve)
