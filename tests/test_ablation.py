"""A grid of runs of the tiny model: its cells, what they share, what fails, what is searched, and what is said."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from rich.console import Console
from tiny import problems, write_config

from rlhf_fdiv import ablation, grid
from rlhf_fdiv.board import Board
from rlhf_fdiv.config.files import read_yaml


@pytest.fixture
def make(start, data, tmp_path):
    """make(grid=…, …): an ablation file beside its base config; returns its path."""

    def make(base=None, **raw):
        config = tiny.raw_config(start, data, tmp_path / "unused") | {"report_to": "none"}
        config["policy"]["max_steps"] = 2
        config["evaluate"] |= {"num_prompts": 3, "perplexity_rows": 0, "samples": 2}
        write_config(tmp_path / "base.yaml", config | (base or {}))
        raw = {"name": "ab", "config": "base.yaml", "output_dir": str(tmp_path / "runs"), **raw}
        return Path(write_config(tmp_path / "grid.yaml", raw))

    return make


POLICY = {"stages": ["policy", "evaluate"], "target": {"name": "tilted", "reward": "praise", "beta": 0.5},
          "scorers": {"praise": {"name": "pattern", "pattern": tiny.PATTERN}}}  # fmt: skip


def resolved(folder):
    return read_yaml(folder / "resolved_config.yaml")


@pytest.mark.slow
def test_every_combination_is_an_ordinary_run_folder_and_shared_stages_run_once(make, tmp_path, call):
    path = make(grid={"divergence": ["js", {"name": "alpha", "alpha": 0.3}], "target.beta": [0.5, 1.0], "seed": [0, 1]})
    code, out, err = call("ablate", str(path))
    assert code == 0, err
    runs = tmp_path / "runs" / "ab"
    names = {f"{f}-beta={b}-seed={s}" for f in ("js", "alpha-alpha=0.3") for b in (0.5, 1.0) for s in (0, 1)}
    assert {p.name for p in runs.iterdir()} == names | {"shared"}
    assert sorted(p.name for p in (runs / "shared" / "all").iterdir() if p.is_dir()) == ["reward", "sft"]
    for name in names:
        assert (runs / name / "report.md").is_file()
        assert not (runs / name / "sft").exists()
    config = resolved(runs / "alpha-alpha=0.3-beta=1.0-seed=1")
    assert config["divergence"] == {"name": "alpha", "alpha": 0.3}
    assert (config["target"]["beta"], config["seed"]) == (1.0, 1)
    assert (out.count("  done  "), out.count("  policy.objective ")) == (1, 8)
    assert "[8/8]" in out
    before = (runs / "js-beta=0.5-seed=0" / "manifest.json").stat().st_mtime_ns
    assert call("ablate", str(path)) == (0, "", "")
    assert (runs / "js-beta=0.5-seed=0" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_cell_that_finished_with_another_config_is_named_and_not_taken_for_this_one(make, call):
    grid = {"divergence": ["js"]}
    assert call("ablate", str(make(POLICY, grid=grid)))[0] == 0
    path = make(POLICY | {"seed": 5}, grid={"divergence": ["tv", "js"]})
    for command in ("ablate", "report"):
        code, out, err = call(command, str(path))
        assert code == 2, out
        assert "holds a run with another config (seed: 0 → 5)" in err


def test_an_override_that_is_none_is_told(make):
    assert "write key=value" in problems(grid.load, make(POLICY, grid={"seed": [0]}), ["policy.max_steps"])[0]


def test_shared_stages_run_once_for_each_value_that_they_depend_on(make):
    path = make(grid={"sft.learning_rate": [1e-2, 1e-3], "divergence": ["js", "tv"], "seed": [0, 1]})
    ab = grid.load(path)
    shared, cells = grid.shared_cells(ab), grid.grid_cells(ab)
    assert [c.name for c in shared] == ["learning_rate=0.01", "learning_rate=0.001"]
    assert {c.config.seed for c in shared} == {0}
    assert len(cells) == 8
    for cell in cells:
        assert Path(cell.config.reuse).name == f"learning_rate={cell.values['sft.learning_rate']}"
        assert cell.config.sft.learning_rate == cell.values["sft.learning_rate"]


def test_only_stages_that_the_cells_ask_for_are_shared(make):
    """A policy with a pattern for its reward needs no reward model, nor the pairs that one is made from."""
    ab = grid.load(make(POLICY | {"stages": ["sft", "policy"]}, grid={"divergence": ["js", "tv"]}))
    (shared,) = grid.shared_cells(ab)
    assert shared.config.stages == ["sft"]
    assert {cell.config.reuse for cell in grid.grid_cells(ab)} == {str(shared.config.folder)}


@pytest.mark.slow
def test_a_broken_cell_is_named_and_the_rest_goes_on_until_retry_mends_it(make, tmp_path, call, monkeypatch):
    module = tmp_path / "mine.py"
    good = "def good(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"
    module.write_text(good + "def bad(prompts, completions, **columns):\n    raise RuntimeError('no server')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    scorers = POLICY["scorers"] | {"mine": {"name": "function", "path": "mine:good"}}
    path = make(POLICY | {"scorers": scorers}, grid={"scorers.mine.path": ["mine:good", "mine:bad"], "seed": [0]})
    code, out, _ = call("ablate", str(path))
    assert code == 1
    broken = tmp_path / "runs" / "ab" / "mine_bad-seed=0"
    assert "no server" in (broken / "failed.txt").read_text()
    assert "1 of 2 failed; run them again with --retry: mine_bad-seed=0" in out
    assert (broken.parent / "mine_good-seed=0" / "report.md").is_file()
    code, out, _ = call("ablate", str(path))
    assert code == 1, "it is not tried again unasked"
    assert "[1/1]" not in out
    sys.modules.pop("mine", None)
    module.write_text(good + "bad = good\n")
    code, out, _ = call("ablate", str(path), "--retry")
    assert code == 0, out
    assert not (broken / "failed.txt").exists()


def test_a_killed_cell_goes_on_from_its_checkpoint(make, tmp_path, call, monkeypatch):
    path = make(POLICY | {"policy": {**tiny.raw_config("", {"gold": ""}, tmp_path)["policy"], "max_steps": 4}},
                grid={"seed": [0]})  # fmt: skip
    from rlhf_fdiv.stages import policy

    real = policy.Log.step

    def stop(self, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return real(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(policy.Log, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            ablation.ablate(path, [])
    assert ablation.ablate(path, [])
    assert "resumed from" in (tmp_path / "runs" / "ab" / "seed=0" / "log.txt").read_text()


@pytest.mark.slow
def test_the_search_takes_the_best_of_each_f_on_its_own_runs_and_says_what_it_cost(make, tmp_path, call):
    search = {"values": {"policy.learning_rate": [1e-9, 5e-2]}, "metric": "policy.praise",
              "overrides": {"seed": 77, "policy.max_steps": 12}}  # fmt: skip
    path = make(POLICY, grid={"divergence": ["reverse_kl", "js"], "seed": [0, 1]}, search=search)
    code, _, err = call("ablate", str(path))
    assert code == 0, err
    folder = tmp_path / "runs" / "ab"
    report = json.loads((folder / "search.json").read_text())
    assert report["samples"] == 4 * 12 * 4 * 4
    for f in ("reverse_kl", "js"):
        rows = report["tried"][f]
        best = max(rows, key=lambda row: row["policy.praise"])
        assert [row["policy.learning_rate"] for row in rows] == [1e-9, 5e-2]
        assert report["chosen"][f] == {"policy.learning_rate": best["policy.learning_rate"]}
        assert resolved(folder / "search" / f"{f}-learning_rate=0.05")["seed"] == 77
        for seed in (0, 1):
            config = resolved(folder / f"{f}-seed={seed}")
            assert config["policy"]["learning_rate"] == best["policy.learning_rate"]
            assert (config["policy"]["max_steps"], config["seed"]) == (2, seed)
    assert report["at_edge"] == ["reverse_kl", "js"], "of two values, each is an edge"
    assert report["chosen"]["reverse_kl"] == {"policy.learning_rate": 5e-2}, "a rate that learns nothing is not chosen"


@pytest.mark.parametrize(("best", "wanted"), [("max", 2), ("min", 3)])
def test_the_choice_is_the_best_that_was_measured(make, tmp_path, best, wanted):
    path = make(POLICY, grid={"divergence": ["js"]},
                search={"values": {"policy.learning_rate": [1, 2, 3, 4]}, "metric": "a.b", "best": best})  # fmt: skip
    ab = grid.load(path)
    cells = grid.search_cells(ab)
    for cell, value in zip(cells, [0.5, 0.9, 0.1, None], strict=True):
        for stage in cell.config.stages:
            (cell.config.folder / stage).mkdir(parents=True)
            (cell.config.folder / stage / "finished.json").write_text("{}")
        (cell.config.folder / "evaluate" / "metrics.json").write_text(json.dumps({"a": {"b": value}, "list": [1]}))
    assert grid.choose(ab) == {"js": {"policy.learning_rate": wanted}}
    assert json.loads((ab.folder / "search.json").read_text())["at_edge"] == []
    assert math.isnan(cells[3].metric("a.b"))
    (message,) = problems(cells[0].metric, "a.bb")
    assert "did you mean 'a.b'" in message
    assert "no figure 'list'" in problems(cells[0].metric, "list")[0]


def test_a_metric_may_name_the_runs_own_f_whose_label_has_dots(make):
    path = make(POLICY, grid={"divergence": [{"name": "alpha", "alpha": 0.3}]})
    (cell,) = grid.grid_cells(grid.load(path))
    (cell.config.folder / "evaluate").mkdir(parents=True)
    text = json.dumps({"to": {"alpha(alpha=0.3)": 2.5, "alpha(alpha=0.3).x": {"y": 7}}})
    (cell.config.folder / "evaluate" / "metrics.json").write_text(text)
    assert cell.metric("to.{divergence}") == 2.5
    assert cell.metric("to.{divergence}.x.y") == 7


@pytest.mark.slow
def test_printed_commands_run_the_same_cells(make, tmp_path, call):
    path = make(POLICY, grid={"divergence": ["js", "tv"]})
    code, out, _ = call("ablate", str(path), "--print-commands")
    lines = out.splitlines()
    assert code == 0
    assert [shlex.split(line)[:4] for line in lines] == [["python", "-m", "rlhf_fdiv.cli", "run"]] * 2
    subprocess.run([sys.executable, *shlex.split(lines[0])[1:]], check=True, capture_output=True)
    assert (tmp_path / "runs" / "ab" / "js" / "report.md").is_file()
    code, out, _ = call("ablate", str(path), "--print-commands", "--launch", "accelerate launch --num_processes 2")
    (line,) = out.splitlines()
    assert line.startswith("accelerate launch --num_processes 2 -m rlhf_fdiv.cli run ")
    assert "/tv/" in line


def test_printed_commands_begin_with_what_is_shared(make, call):
    path = make(grid={"divergence": ["js", "tv"]})
    (line,) = call("ablate", str(path), "--print-commands")[1].splitlines()
    assert "/shared/all/" in line


@pytest.mark.slow
def test_a_launcher_runs_each_cell_in_processes_of_its_own(make, tmp_path, call):
    path = make(POLICY, grid={"divergence": ["js"]})
    code, out, _ = call("ablate", str(path), "--launch", sys.executable)
    assert code == 0, out
    assert "policy: into" in (tmp_path / "runs" / "ab" / "js" / "log.txt").read_text()
    code, out, _ = call("ablate", str(make(POLICY, name="other", grid={"divergence": ["js"]})), "--launch", "false")
    assert code == 1
    assert "exit code 1; see log.txt" in out


@pytest.mark.slow
def test_cells_run_side_by_side_and_a_killed_process_takes_no_other_cell_with_it(make, tmp_path, call, monkeypatch):
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n"
        "def kill(prompts, completions, **columns):\n"
        "    if os.path.exists('deadly'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    scorers = POLICY["scorers"] | {"deadly": {"name": "function", "path": "deadly:kill"}}
    rewards = ["praise", "deadly"]
    path = make(
        POLICY | {"scorers": scorers}, grid={"target.reward": rewards, "seed": [0, 1]}, report=["policy.praise"]
    )
    (tmp_path / "deadly").touch()
    code, out, _ = call("ablate", str(path), "stages=[policy]", "--jobs", "2")
    assert code == 1
    runs = tmp_path / "runs" / "ab"
    dead = {f"{r}-seed={s}" for r in rewards for s in (0, 1) if "ended" in read(runs / f"{r}-seed={s}" / "failed.txt")}
    assert dead >= {"deadly-seed=0", "deadly-seed=1"}
    assert out.count("FAILED") == len(dead)
    (tmp_path / "deadly").unlink()
    code, out, err = call("ablate", str(path), "--jobs", "2", "--retry")
    assert code == 0, out + err
    assert all((runs / f"{r}-seed={s}" / "report.md").is_file() for r in rewards for s in (0, 1))


def read(path):
    return path.read_text() if path.is_file() else ""


@pytest.mark.slow
def test_cells_of_other_processes_keep_the_name_of_a_users_own_class(make, tmp_path, call, monkeypatch):
    (tmp_path / "own_target.py").write_text(
        "from dataclasses import dataclass\n"
        "from rlhf_fdiv.targets import Tilted\n"
        "@dataclass(frozen=True)\n"
        "class Own(Tilted):\n"
        "    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    target = {"name": "own_target:Own", "reward": "praise", "beta": 0.7}
    path = make(POLICY | {"target": target}, grid={"seed": [0, 1]})
    code, out, err = call("ablate", str(path), "--jobs", "2")
    assert code == 0, out + err
    assert resolved(tmp_path / "runs" / "ab" / "seed=0")["target"]["name"] == "own_target:Own"
    assert call("ablate", str(path), "--jobs", "2") == (0, "", "")


def test_all_is_well_only_if_the_search_was_too(make, monkeypatch):
    ran = []
    monkeypatch.setattr(ablation, "run_cells", lambda cells, *_: ran.append(cells) or len(ran) != 2)
    monkeypatch.setattr(ablation, "phases", lambda _: [("shared", [1]), ("search", [2]), ("cells", [3])])
    assert not ablation.ablate(make(POLICY, grid={"seed": [0]}), [])
    assert ran == [[1], [2], [3]]


@pytest.mark.slow
def test_a_scheduler_takes_the_cells(make, tmp_path, call):
    path = make(POLICY, grid={"divergence": ["js", "tv"]})
    words = ["cluster=local", f"folder={tmp_path / 'jobs'}", "timeout_min=5"]
    code, out, err = call("ablate", str(path), *(x for word in words for x in ("--submitit", word)))
    assert code == 0, out + err
    assert "[2/2]" in out
    assert list((tmp_path / "jobs").glob("*_submitted.pkl"))
    other = make(POLICY, name="other", grid={"divergence": ["js"]})
    code, _, err = call("ablate", str(other), "--submitit", "cluster=local", "--submitit", "timeout=5")
    assert (code, "--submitit: " in err, "timeout" in err) == (2, True, True)


def test_the_live_table_shows_stage_and_steps(make, tmp_path):
    cell = grid.grid_cells(grid.load(make(POLICY, grid={"divergence": ["js", "tv"]})))[0]
    board = Board(1, "")
    board.started(cell)
    policy = cell.config.folder / "policy"
    policy.mkdir(parents=True)
    (policy / "metrics.jsonl").write_text('{"step": 1, "kl": 0.0}\n{"step": 2, "kl"')
    board.console = Console(width=80, record=True)
    board.console.print(board.table())
    drawn = board.console.export_text()
    assert " js " in drawn
    assert " policy " in drawn
    assert " 1/2 " in drawn
    assert "0 of 1 ended" in drawn


def test_a_grid_does_not_go_into_the_folder_of_a_run(make, tmp_path):
    (tmp_path / "runs" / "ab").mkdir(parents=True)
    (tmp_path / "runs" / "ab" / "resolved_config.yaml").touch()
    assert "holds a run of its own" in problems(grid.load, make(POLICY, grid={"seed": [0]}))[0]


def test_an_override_of_a_key_of_the_grid_is_refused(make):
    path = make(POLICY, grid={"seed": [0], "divergence": ["js"]})
    assert "grid.seed: is also an override" in problems(grid.load, path, ["seed=5"])[0]


def test_overrides_reach_every_cell(make):
    ab = grid.load(make(POLICY, grid={"divergence": ["js", "tv"]}), ["policy.max_steps=7", "model.dtype=bfloat16"])
    assert {(c.config.policy.max_steps, c.config.model.dtype) for c in grid.grid_cells(ab)} == {(7, "bfloat16")}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"grid": {"divergenze": ["js"]}}, ("js: ", "divergenze: unknown key; did you mean 'divergence'")),
        ({"grid": {"divergence": ["js", "jss"]}}, ("jss: ", "divergence")),
        ({"grid": {"divergence": []}}, ("grid.divergence",)),
        ({"gird": {"divergence": ["js"]}}, ("gird: unknown key; did you mean 'grid'",)),
        ({"grid": {"seed": [0, 0]}}, ("seed=0: two cells of the grid have this name",)),
        ({"grid": {"seed": [0]}, "search": {"values": {"seed": [1]}, "by": ["divergenc"]}}, ("'divergenc' is not a key",)),
        ({"grid": {"seed": [0]}, "config": "none.yaml"}, ("none.yaml: no such config file",)),
        ({"grid": {"sft.learning_rate": [1.0]}, "search": {"values": {"policy.learning_rate": [1.0]}, "by": []}},
         ("must hold sft.learning_rate",)),
        ({"grid": {"seed": [0]}, "report": []}, ("report: ",)),
        ({"grid": {"seed": [0]}, "search": {"values": {"seed": [1]}, "by": []}}, ("grid.seed: ", "keep one")),
    ],
    ids=lambda x: str(x)[:40],
)  # fmt: skip
def test_what_is_wrong_is_told_before_anything_runs(make, tmp_path, raw, words):
    said = "\n".join(problems(ablation.ablate, make(**raw), []))
    assert all(word in said for word in words), said
    assert not (tmp_path / "runs").exists()
    assert yaml.safe_load((tmp_path / "grid.yaml").read_text())


@pytest.mark.parametrize("text", ["😀", "a\u2028b", "1:30", "010", "é, {x}", "a: b # c", "'\"", "null", "x" * 300])
def test_a_value_reaches_its_cell_as_it_stands(make, text):
    path = make(POLICY, grid={"scorers.praise": [{"name": "pattern", "pattern": text}]})
    (cell,) = grid.grid_cells(grid.load(path))
    assert cell.config.scorers["praise"].pattern == text
