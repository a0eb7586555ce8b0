"""The card (README.md) of a model folder: what it was made of and with, what was measured, in the hub's own form."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, metadata_load

from rlhf_fdiv import divergences
from rlhf_fdiv.config import STAGES, RunConfig, parse
from rlhf_fdiv.config.files import Dumper, read_yaml
from rlhf_fdiv.hub import is_repo
from rlhf_fdiv.known_models import SMOLLM2_ORIGIN, resolve_model
from rlhf_fdiv.report import PANELS, TEMPLATES, divergence_table, main_table, markdown_table, training_figure
from rlhf_fdiv.tracking import MADE_FROM, write_atomically

_SECRET = re.compile("hub_token|password|secret|api_key", re.IGNORECASE)
_OF_THE_CALL = ("output_dir", "reuse", "resume", "report_to", "push_to_hub", "hub_private_repo")


def write_cards(run: Path, stage: str) -> None:
    """The cards of what a stage made, with a picture of its training; after `evaluate` that of the trained model is
    completed with what was measured."""
    config = parse(read_yaml(run / "resolved_config.yaml"))
    trained, compared = config.objective.stage, run / "evaluate" / "before_and_after.png"
    made = trained if stage == "evaluate" else stage
    for folder in filter(Path.is_dir, (run / made / kind for kind in ("model", "adapter"))):
        panels = PANELS if made == trained else ("loss",)
        training_figure(run / made / "metrics.jsonl", folder, panels, kinds=(".png",))
        if stage == "evaluate" and compared.is_file():
            shutil.copyfile(compared, folder / compared.name)
        write_atomically(folder / "README.md", str(card(run, made, folder.name, licence_of(_base(config, made)))))


def card(run: Path, stage: str, kind: str, licence: dict[str, Any]) -> ModelCard:
    """The card of `run/stage/kind`, from the run's config, manifest and figures alone: no path of this machine, no secret."""
    raw = shareable(read_yaml(run / "resolved_config.yaml"))
    config, manifest = parse(raw), _json(run / "manifest.json")
    trained, base = stage == config.objective.stage, _base(config, stage)
    measured, pairs = _json(run / "evaluate" / "metrics.json") if trained else {}, _json(run / stage / "accuracy.json")
    f = divergences.label(config.f if trained else divergences.get(getattr(config, stage).divergence))
    task = "text-classification" if stage == "reward" else "text-generation"
    library = "transformers" if (run / stage / kind / "config.json").is_file() else "rlhf_fdiv"
    name = config.name if trained else f"{config.name}-{stage}"
    head = ModelCardData(
        **licence,
        base_model=base if is_repo(base) else None,
        library_name="peft" if kind == "adapter" else library,
        pipeline_tag=task,
        tags=["rlhf_fdiv", "f-divergence", f, *([config.objective.name] if trained else [])],
        datasets=_of_the_hub(config, stage, manifest) or None,
        model_name=name,
        eval_results=_results(config, task, measured, pairs) or None,
    )
    upto = STAGES if trained else STAGES[: STAGES.index(stage) + 1]
    text = TEMPLATES.get_template("card.md").render(
        head=head.to_yaml(),
        name=name,
        config=config,
        f=f,
        has_objective="objective" in measured.get("policy", {}),
        base=base,
        stage=stage,
        kind=kind,
        pairs=", ".join(f"{key} {value:.3g}" for key, value in pairs.items()),
        main=main_table(config, measured) if measured else "",
        divergences=divergence_table(measured) if measured else "",
        pictures=sorted((run / stage / kind).glob("*.png")),
        data=_data(config, manifest),
        again=_again(config, raw, [s for s in upto if (run / s).is_dir()]),
        versions=json.dumps({k: manifest[k] for k in ("versions", "git_commit", "machine")}, indent=2),
        licence=licence,
    )
    return ModelCard(text)


def shareable(value: Any) -> Any:
    """A config's values without what is of this machine: a path there becomes the name of its file or folder. Keys that
    can hold a secret are left out."""
    if isinstance(value, dict):
        return {k: shareable(v) for k, v in value.items() if not _SECRET.search(str(k))}
    if isinstance(value, list):
        return [shareable(v) for v in value]
    if isinstance(value, str) and (value.startswith(("/", "./", "../", "~/")) or os.path.exists(value)):
        return os.path.basename(os.path.abspath(value))
    return value


@functools.cache  # on a machine without a network the hub is waited for in vain once
def licence_of(model: str) -> dict[str, str]:
    """The keys of the licence in the card of a base model, in its folder or on the hub; none where it says none."""
    if model == SMOLLM2_ORIGIN:
        return {"license": "apache-2.0"}
    path = Path(resolve_model(model))
    with contextlib.suppress(Exception):  # without a card, a network or sound YAML nobody has said
        said = metadata_load(path / "README.md" if path.is_dir() else hf_hub_download(model, "README.md")) or {}
        return {k: said[k] for k in ("license", "license_name", "license_link") if said.get("license") and said.get(k)}
    return {}


def _base(config: RunConfig, stage: str) -> str:
    own = config.training.model if stage == config.objective.stage else None
    return SMOLLM2_ORIGIN if (name := own or config.model.name_or_path) == "smollm2-135m" else name


def _of_the_hub(config: RunConfig, stage: str, manifest: dict[str, Any]) -> list[str]:
    """The hub's datasets among what a stage was made from; files have a checksum, folders here no owner."""
    keys = [key.removeprefix("data.") for key in MADE_FROM[stage] if key.startswith("data.")]
    names = [getattr(config.data, key) for key in keys if not manifest["data_sha256"].get(key)]
    return [name for name in names if name and "/" in name and is_repo(name)]


def _data(config: RunConfig, manifest: dict[str, Any]) -> str:
    names = {f"scorers.{name}.data": getattr(scorer, "data", "") for name, scorer in config.scorers.items()}
    names |= vars(config.data)
    rows = [(key, f"`{names[key]}`", sha256 or "–") for key, sha256 in manifest["data_sha256"].items()]
    return markdown_table(("key", "data", "sha256"), *rows)


def _again(config: RunConfig, raw: dict[str, Any], stages: list[str]) -> str:
    """The config that makes the model again, by these stages and those that the run reused."""
    again = {k: v for k, v in raw.items() if k not in _OF_THE_CALL}
    again["stages"] = [*(s for s in ("sft", "reward") if config.reuse and s not in stages), *stages]
    return yaml.dump(again, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _results(config: RunConfig, task: str, measured: dict[str, Any], pairs: dict[str, float]) -> list[EvalResult]:
    """What was measured, for the hub's `model-index`; what is withheld is not among it."""
    data, mine = config.data, measured.get("policy", {})
    found = [(key, mine.get(key), mine.get(f"{key}_se"), data.prompts_eval) for key in ("objective", *config.scorers)]
    found += [("perplexity", mine.get("perplexity"), None, data.sft_eval)]
    found += [("accuracy", pairs.get("accuracy"), None, data.preferences_eval)]
    for where in ("reference", "target"):
        for f, x in measured.get(f"divergence_to_{where}", {}).items():
            found.append((f"{f} to the {where}, nats", x["value"], x["standard_error"], data.prompts_eval))
    return [
        EvalResult(
            task_type=task,
            dataset_type=str(source),
            dataset_name=str(source),
            metric_type=key,
            metric_value=value,
            metric_args=None if error is None else {"standard_error": error},
        )
        for key, value, error, source in found
        if value is not None
    ]


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
