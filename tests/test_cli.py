"""The command line: the config that it resolves, what it lists, and how a mistake ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_fdiv import divergences
from rlhf_fdiv.config import load, schema
from rlhf_fdiv.stages.common import run_stage

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
STAGES = ("sft", "reward", "policy", "evaluate")


def errors(result: tuple[int, str, str]) -> list[str]:
    """The messages of a call that ended as a user's mistake should: exit code 2, one line each, no traceback."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    lines = err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]


# the resolved config


@pytest.mark.parametrize("command", ["run", *STAGES])
def test_a_config_may_be_a_word_or_an_option_and_overrides_stand_anywhere(call, command):
    forms = [
        (QUICKSTART, "seed=3", "policy.max_steps=7", "--print-config"),
        (QUICKSTART, "--print-config", "seed=3", "policy.max_steps=7"),
        ("--config", QUICKSTART, "seed=3", "policy.max_steps=7", "--print-config"),
        ("--print-config", "seed=3", "--config", QUICKSTART, "policy.max_steps=7"),
        ("seed=3", "policy.max_steps=7", f"--config={QUICKSTART}", "--print-config"),
    ]
    results = [call(command, *form) for form in forms]
    assert [code for code, _, _ in results] == [0] * len(forms)
    printed = {out for _, out, _ in results}
    assert len(printed) == 1
    config = yaml.safe_load(printed.pop())
    assert (config["seed"], config["policy"]["max_steps"], config["name"]) == (3, 7, "quickstart")
    assert config["stages"] == (list(STAGES) if command == "run" else [command])


def test_the_printed_config_is_a_config(call, tmp_path):
    _, printed, _ = call("run", QUICKSTART, "--print-config")
    (tmp_path / "printed.yaml").write_text(printed, encoding="utf-8")
    assert load(tmp_path / "printed.yaml") == load(QUICKSTART)


@pytest.mark.parametrize("text", ["a//b/", "./a", "a/./b", "org/name", "s3://bucket/x"])
@pytest.mark.parametrize("option", [True, False])
def test_an_overrides_text_is_taken_as_it_stands(call, text, option):
    config = ("--config", QUICKSTART) if option else (QUICKSTART,)
    _, printed, _ = call("run", *config, f"output_dir={text}", "--print-config")
    assert yaml.safe_load(printed)["output_dir"] == text


# mistakes


@pytest.mark.parametrize("command", ["run", "policy"])
@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "which config?"),
        (("--print-config",), "which config?"),
        (("seed=3",), "which config?"),
        (("gone.yaml",), "gone.yaml: no such config file"),
        (("--config", "gone.yaml"), "gone.yaml: no such config file"),
        ((str(ROOT),), "YAML"),
        ((QUICKSTART, "polcy.max_steps=3"), "polcy: unknown key; did you mean 'policy'?"),
        (
            (QUICKSTART, "policy.num_generation=3"),
            "policy.num_generation: unknown key; did you mean 'num_generations'?",
        ),
        ((QUICKSTART, "policy.max_steps=ten"), "policy.max_steps: "),
        ((QUICKSTART, "max_steps"), "override 'max_steps'"),
        ((QUICKSTART, "a.=1"), "override 'a.=1'"),
        ((QUICKSTART, "seed=[1"), "override 'seed=[1'"),
        ((QUICKSTART, "seed=!!int x"), "override 'seed=!!int x'"),
        ((QUICKSTART, QUICKSTART), "override"),
        (("--config", QUICKSTART, QUICKSTART), "override"),
    ],
    ids=lambda x: " ".join(Path(w).name for w in x) or "nothing" if isinstance(x, tuple) else "",
)
def test_a_mistake_ends_with_exit_code_2_and_one_line(call, command, words, part):
    (message,) = errors(call(command, *words))
    assert part in message


def test_all_mistakes_are_printed_each_on_its_line(call):
    found = errors(
        call("run", QUICKSTART, "polcy=1", "seed=a", "sft.learning_rat=1", "estimator=rlo", "divergence=jss")
    )
    assert len(found) == 5
    assert all("quickstart.yaml: " in message for message in found)


@pytest.mark.parametrize("words", [("runn", QUICKSTART), ("run", "--confg", QUICKSTART), ("divergences", "js")])
def test_an_unknown_command_or_option_ends_with_exit_code_2_and_says_error(call, words):
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert "error" in err.lower()
    assert "Traceback" not in err
    assert words[0] == "divergences" or "run" in err


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_as_a_module_ends_a_mistake_in_the_same_way(stage, monkeypatch, capsys):
    for words, count in (([], 1), (["gone.yaml"], 1), ([QUICKSTART, "seed=a", "polcy=1"], 2)):
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *words])
        with pytest.raises(SystemExit) as caught:
            run_stage(stage)
        assert len(errors((caught.value.code, *capsys.readouterr()))) == count


def test_the_console_script_itself_prints_no_traceback():
    script = Path(sys.executable).with_name("rlhf-fdiv")
    made = subprocess.run([script, "run", "gone.yaml", "seed=1"], capture_output=True, text=True)
    assert errors((made.returncode, made.stdout, made.stderr)) == ["gone.yaml: no such config file"]


@pytest.mark.slow
def test_a_reward_that_never_answers_prints_no_traceback_as_the_process_ends(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef score(prompts, completions, **columns):\n    time.sleep(99)\n")
    code = (
        "import torch\nfrom rlhf_fdiv.rewards import Function\nfrom rlhf_fdiv.scoring import Scorers\n"
        "Scorers({'r': Function('slow:score', timeout=0.1)}, torch.device('cpu'))(['r'], ['p'], ['c'])"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert "no answer within 0.1 s" in made.stderr
    assert "Exception ignored" not in made.stderr


# what it knows


@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("policy", "--help"), ()])
def test_help_loads_nothing_heavy(words):
    code = (
        "import sys\nfrom rlhf_fdiv import cli\ntry:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print('LOADED', [m for m in ('torch', 'transformers', 'trl', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    made = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert made.stdout.endswith("LOADED []\n")
    assert "Usage" in made.stdout + made.stderr


def test_help_names_every_command(call):
    code, out, _ = call("--help")
    assert code == 0
    for name in ("run", *STAGES, "divergences", "config-schema"):
        assert name in out


def test_divergences_are_listed_with_formula_and_direction(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call("divergences")
    assert code == 0
    for name in divergences.names():
        assert name in out
    assert "t ln t − t + 1" in out
    assert "mode seeking" in out


def test_no_name_of_a_divergence_is_cut_in_a_plain_terminal(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call("divergences")
    assert [name for name in divergences.names() if name not in out] == []


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_divergences_are_drawn_into_a_file(call, tmp_path, suffix, magic):
    path = tmp_path / "new folder" / f"all.{suffix}"
    code, out, _ = call("divergences", "--plot", str(path))
    assert code == 0
    assert path.read_bytes().startswith(magic)
    assert path.name in out.replace("\n", "")


@pytest.mark.parametrize("name", ["all.foo", "file/all.png"])
def test_a_plot_that_cannot_be_written_is_a_mistake_like_any_other(call, tmp_path, name):
    (tmp_path / "file").write_text("")
    code, _, err = call("divergences", "--plot", str(tmp_path / name))
    assert code == 2
    assert err.startswith("error: ")
    assert Path(name).name in err


def test_config_schema_is_the_schema_as_json(call):
    code, out, _ = call("config-schema")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(schema()))
