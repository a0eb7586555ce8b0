"""The run folder: a changed config is seen, a finished stage is kept, nothing is overwritten and no file is half."""

import hashlib
import importlib
import json
import os

import pytest
import yaml

from rlhf_fdiv import tracking
from rlhf_fdiv.checkpoints import newest_checkpoint, prune_checkpoints
from rlhf_fdiv.config import load, parse, to_dict
from rlhf_fdiv.config.files import with_overrides
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.tracking import (
    Metrics,
    RunFolder,
    environment,
    is_finished,
    write_atomically,
)

DATA = dict.fromkeys(("sft_train", "preferences_train", "prompts_train", "prompts_eval"), "rows.jsonl")
STAGES = ("sft", "reward", "policy", "evaluate")


@pytest.fixture
def run(tmp_path):
    """run("a.b=value", …): the run folder of a config."""

    def run(*overrides: str) -> RunFolder:
        raw = {"name": "x", "output_dir": str(tmp_path / "runs"), "model": {"name_or_path": "m"}, "data": DATA}
        return RunFolder(parse(with_overrides(raw, list(overrides))))

    return run


def finish(folder: RunFolder, *stages: str) -> RunFolder:
    folder.prepare()
    for stage in stages:
        with folder.running(stage) as out:
            (out / "made").write_text(stage)
    return folder


def problem(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    (message,) = caught.value.problems
    return message


def tree(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def rewrite(folder: RunFolder, change) -> None:
    path = folder.path / "resolved_config.yaml"
    raw = yaml.safe_load(path.read_text())
    change(raw)
    path.write_text(yaml.safe_dump(raw))


# an earlier run of this name


def test_a_run_of_a_version_that_had_fewer_keys_goes_on_and_one_with_others_is_named(run):
    """A key that has come since stands for its default: neither resume nor reuse may be lost to an upgrade."""
    folder = finish(run("reuse=null"), "sft")
    rewrite(folder, lambda raw: (raw["policy"].pop("logprob_chunk"), raw["sft"].pop("save_steps")))
    run().prepare()
    finish(run(), "sft")
    rewrite(folder, lambda raw: raw["sft"].pop("save_steps"))
    assert run("name=y", f"reuse={folder.path}").find("sft") == folder.stage("sft")
    assert "sft.save_steps: 0 → 7" in problem(run("sft.save_steps=7").prepare)
    rewrite(folder, lambda raw: raw["sft"].update(gone=1))
    assert "sft.gone: 1 → None" in problem(run().prepare)


def test_the_same_config_twice_changes_nothing(run):
    folder = finish(run(), *STAGES)
    before = tree(folder.path)
    run().prepare()
    assert tree(folder.path) == before
    assert load(folder.path / "resolved_config.yaml") == folder.config


@pytest.mark.parametrize("free", ["stages=[policy]", "report_to=none"])
def test_which_stages_run_and_who_is_told_may_change(run, free):
    finish(run(), "sft")
    run(free).prepare()
    run().prepare()


def test_a_changed_config_names_each_key_with_old_and_new_and_what_to_do(run):
    folder = finish(run(), "sft")
    before = tree(folder.path)
    changed = run("policy.learning_rate=1e-4", "divergence=js", "seed=3", "model.lora={r: 2}")
    message = problem(changed.prepare)
    named = ["policy.learning_rate: 1e-05 → 0.0001", "'reverse_kl'", "'js'", "seed: 0 → 3", "model.lora: None →"]
    for part in (str(folder.path), *named, "name=", "resume="):
        assert part in message
    assert "max_steps" not in message
    assert tree(folder.path) == before


@pytest.mark.parametrize("stage", STAGES)
def test_resume_moves_a_stage_and_all_after_it_aside_and_deletes_nothing(run, stage):
    folder = finish(run(), *STAGES)
    run(f"resume={stage}").prepare()
    kept, moved = STAGES[: STAGES.index(stage)], STAGES[STAGES.index(stage) :]
    for name in STAGES:
        assert is_finished(folder.stage(name)) == (name in kept)
        place = folder.stage(name) if name in kept else folder.path / f"{name}.before-1"
        assert (place / "made").read_text() == name
    assert not any(folder.stage(name).exists() for name in moved)


def test_what_was_moved_aside_stays_when_it_happens_again(run):
    folder = finish(run(), *STAGES)
    for step in (1e-4, 1e-3):
        finish(run("resume=policy", f"policy.learning_rate={step}"), "policy")
    assert sorted(p.name for p in folder.path.glob("policy*")) == ["policy", "policy.before-1", "policy.before-2"]
    assert sorted(p.name for p in folder.path.glob("evaluate*")) == ["evaluate.before-1"]
    run("policy.learning_rate=1e-3").prepare()
    assert "0.001 → 1e-05" in problem(run().prepare)


@pytest.mark.parametrize(
    ("resume", "change", "mend"),
    [
        ("policy", "sft.max_steps=3", "sft"),
        ("policy", "seed=3", "sft"),
        ("policy", "model.dtype=float64", "sft"),
        ("policy", "reward.l2=3", "reward"),
        ("evaluate", "policy.learning_rate=1e-4", "policy"),
        ("evaluate", "divergence=js", "policy"),
        ("evaluate", "scorers={reward: {name: reward_model, clip: [-1.0, 1.0]}}", "policy"),
    ],
)
def test_resume_cannot_change_what_an_earlier_stage_was_made_with(run, resume, change, mend):
    folder = finish(run(), *STAGES)
    before = tree(folder.path)
    message = problem(run(f"resume={resume}", change).prepare)
    assert change.partition("=")[0] in message
    assert f"resume={mend}" in message
    assert tree(folder.path) == before
    run(f"resume={mend}", change).prepare()


@pytest.mark.parametrize("content", ["", "a: [", "[]", "3"])
def test_a_broken_resolved_config_is_one_message(run, content):
    folder = finish(run())
    (folder.path / "resolved_config.yaml").write_text(content)
    assert "resolved_config.yaml" in problem(run().prepare)


def test_a_file_where_the_run_folder_should_be_is_one_message(run, tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    assert "runs" in problem(run().prepare)


# stages


def test_a_stage_that_ends_is_finished_and_found_and_timed(run):
    folder = finish(run(), "sft")
    assert is_finished(folder.stage("sft"))
    assert folder.find("sft") == folder.stage("sft") == folder.path / "sft"
    assert json.loads((folder.path / "sft" / "finished.json").read_text())["seconds"] >= 0
    assert folder.find("reward") is None


@pytest.mark.parametrize("error", [RuntimeError, UserError, KeyboardInterrupt])
def test_a_stage_that_raises_stays_unfinished_with_what_it_made(run, error):
    folder = run()
    folder.prepare()

    def fail():
        with folder.running("policy") as out:
            (out / "made").write_text("half")
            raise error("stop")

    with pytest.raises(error):
        fail()
    assert not is_finished(folder.stage("policy"))
    assert folder.find("policy") is None
    assert not (folder.path / "manifest.json").exists()
    with folder.running("policy") as out:
        assert (out / "made").read_text() == "half"
    assert is_finished(folder.stage("policy"))


def test_the_manifest_says_what_ran_with_what(run, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "é"}')
    folder = finish(
        run("seed=7", f"data={{sft_train: {data}, prompts_eval: org/hub}}", "stages=[sft, evaluate]"), "sft"
    )
    finish(folder, "evaluate")
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert (manifest["name"], manifest["seed"]) == ("x", 7)
    assert manifest["data_sha256"]["sft_train"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert not manifest["data_sha256"].get("prompts_eval")
    assert manifest["wall_seconds"].keys() == {"sft", "evaluate"}
    assert {"python", "torch", "transformers", "trl", "rlhf_fdiv"} <= manifest["versions"].keys()
    assert all(manifest["versions"].values())


def test_the_manifest_keeps_the_hash_of_the_data_that_a_stage_has_read(run, tmp_path):
    paths = {key: tmp_path / f"{key}.jsonl" for key in ("sft_train", "prompts_eval")}
    for path in paths.values():
        path.write_text('{"prompt": "a"}')
    folder = finish(run(*(f"data.{key}={path}" for key, path in paths.items())), "sft")
    before = json.loads((folder.path / "manifest.json").read_text())["data_sha256"]
    for path in paths.values():
        path.write_text('{"prompt": "b"}')
    finish(folder, "evaluate")
    after = json.loads((folder.path / "manifest.json").read_text())["data_sha256"]
    assert {key: before[key] == after[key] for key in paths} == {"sft_train": True, "prompts_eval": False}


def test_the_manifest_needs_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["git_commit"] is None


# reuse


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_reuse_finds_a_stage_made_with_the_same_sections_whatever_else_differs(run, stage):
    """The seed too: policies of several seeds start from one SFT model."""
    other = finish(run(), "sft", "reward")
    mine = run("name=y", f"reuse={other.path}", "policy.max_steps=3", "divergence=js", "evaluate.samples=1", "seed=3")
    assert mine.find(stage) == other.stage(stage)
    finish(mine, stage)
    assert mine.find(stage) == mine.stage(stage)


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("sft", "sft.max_steps=3"), ("sft", "model.dtype=float64"),
        ("sft", "data.sft_train=o.jsonl"), ("reward", "reward.l2=3"),
        ("reward", "model.name_or_path=n"), ("reward", "data.preferences_train=o.jsonl"),
    ],
)  # fmt: skip
def test_reuse_refuses_a_stage_made_otherwise_and_names_the_difference(run, stage, change):
    other = finish(run(), "sft", "reward")
    message = problem(run("name=y", f"reuse={other.path}", change).find, stage)
    assert f"{change.partition('=')[0]}: " in message
    assert " → " in message


@pytest.mark.parametrize(("stage", "change"), [("sft", "reward.l2=3"), ("reward", "sft.max_steps=3")])
def test_reuse_of_one_stage_does_not_ask_how_the_other_was_made(run, stage, change):
    other = finish(run(), "sft", "reward")
    assert run("name=y", f"reuse={other.path}", change).find(stage) == other.stage(stage)


def test_reuse_of_what_is_not_finished_or_no_run_is_one_message(run, tmp_path):
    assert "gone" in problem(run(f"reuse={tmp_path / 'gone'}").find, "sft")
    other = finish(run("name=other"), "sft")
    assert "not a finished stage" in problem(run(f"reuse={other.path}").find, "reward")
    (other.path / "resolved_config.yaml").unlink()
    assert str(other.path) in problem(run(f"reuse={other.path}").find, "sft")


def test_policy_and_evaluation_are_never_taken_from_another_run(run):
    other = finish(run("name=other"), *STAGES)
    assert run(f"reuse={other.path}").find("policy") is None
    assert run(f"reuse={other.path}").find("evaluate") is None


# metrics


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_json_rows_with_null_for_what_is_not_finite(tmp_path):
    metrics = Metrics(tmp_path, "none")
    metrics.log(1, {"a": 1 / 3, "b": float("nan"), "c": float("inf"), "d": 0})
    assert rows(tmp_path) == [{"step": 1, "a": 0.333333, "b": None, "c": None, "d": 0.0}]
    metrics.close()
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_metrics_drop_the_rows_after_the_step_that_a_run_resumes_from(tmp_path, step, kept):
    first = Metrics(tmp_path, "none")
    for i in (1, 2, 3):
        first.log(i, {"old": i})
    first.close()
    again = Metrics(tmp_path, "none", resume_step=step)
    again.log(step + 1, {"new": 1})
    again.close()
    assert [row["step"] for row in rows(tmp_path)] == [*kept, step + 1]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_half_a_row_of_a_killed_run_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a"')
    again = Metrics(tmp_path, "none", resume_step=1)
    again.log(2, {"a": 2.0})
    again.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_tensorboard_holds_the_same_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, "tensorboard")
    metrics.log(1, {"objective": 0.5, "kl/reference": 2.0})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"objective", "kl/reference"}
    assert [(e.step, e.value) for e in events.Scalars("kl/reference")] == [(1, 2.0)]


ROWS = [{"step": 2, "prompts": "film <b>", "completions": "a | b\nc", "reward": 0.5, "references": ["x"]}]


@pytest.mark.slow
def test_every_tracker_gets_the_same_names_and_the_completions(tmp_path, monkeypatch):
    """wandb offline and trackio, read back by their own readers."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trackio = importlib.import_module("trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    folder = tmp_path / "tiny" / "policy"
    folder.mkdir(parents=True)
    for kind in ("wandb", "trackio", "tensorboard"):
        metrics = Metrics(folder, kind)
        metrics.log(1, {"objective": 0.25, "to_target.js": 1.0})
        metrics.log(2, {"objective": 0.5, "to_target.js": 0.5})
        metrics.log_table(2, "completions", ROWS)
        metrics.close()
    (written,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    raw = written.read_bytes()
    assert b"objective" in raw
    assert b"to_target.js" in raw
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/completions_*.json")
    assert "a | b" in table.read_text(encoding="utf-8")
    assert (tmp_path / "trackio/tiny.db").is_file()
    (run,) = trackio.Api().runs("tiny")
    assert run.name == "policy"
    logs = trackio.sqlite_storage.SQLiteStorage.get_logs("tiny", "policy")
    assert [(x["objective"], x["to_target.js"]) for x in logs if "objective" in x] == [(0.25, 1.0), (0.5, 0.5)]
    assert any("completions" in x for x in logs)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"objective", "to_target.js"}
    assert "completions/text_summary" in events.Tags()["tensors"]


# checkpoints and files

CHECKPOINTS = ("checkpoint-9", "checkpoint-10", "checkpoint-100")
OTHERS = (
    ".checkpoint-200",
    "checkpoint-300.part",
    "checkpoint-",
    "checkpoint-best",
    "checkpoint-best2",
    "checkpoint-1-0",
)


@pytest.fixture
def checkpoints(tmp_path):
    for name in (*CHECKPOINTS, *OTHERS):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy_state.json").write_text(name)
    return tmp_path


def test_a_checkpoint_of_a_trl_trainer_is_whole_once_its_last_file_is(checkpoints):
    last = checkpoints / "checkpoint-200" / "trainer_state.json"
    last.parent.mkdir()
    for text in (None, "", '{"global_step": 2'):
        if text is not None:
            last.write_text(text)
        assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-100"
    last.write_text('{"global_step": 200}')
    assert newest_checkpoint(checkpoints) == last.parent


def test_the_newest_checkpoint_is_the_highest_whole_one(checkpoints, tmp_path_factory):
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-100"
    assert newest_checkpoint(tmp_path_factory.mktemp("none")) is None
    assert newest_checkpoint(checkpoints / "gone") is None


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_pruning_keeps_the_newest_and_touches_nothing_else(checkpoints, keep):
    prune_checkpoints(checkpoints, keep)
    assert {p.name for p in checkpoints.iterdir()} == {*CHECKPOINTS[-keep:], *OTHERS}


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "é 模型")
    write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "text \ud800")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(tracking.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "other")
    assert tree(tmp_path) == {"a.json": "new"}


def test_the_resolved_config_is_plain_yaml_of_the_whole_config(run):
    folder = finish(run("model.lora={r: 2}", "target={name: tilted, beta: 1e-6}"))
    text = (folder.path / "resolved_config.yaml").read_text()
    assert yaml.safe_load(text) == to_dict(folder.config)
    assert text.startswith("name: x\n")
