"""The wheel, in an environment that has the dependencies but not the repository."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml
from tiny import problems

import rlhf_fdiv
from rlhf_fdiv import config
from rlhf_fdiv.config.files import find_config

ROOT = Path(rlhf_fdiv.__file__).parent.parent
IMPORTS = {
    "eval": ["lm_eval", "mauve"],
    "report": ["altair", "vl_convert", "jinja2", "markdown_it"],
    "tracking": ["trackio", "wandb"],
    "submitit": ["submitit"],
}


def say(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    say(sys.executable, "-m", "build", "--outdir", out, ROOT)
    assert len(list(out.glob("*.tar.gz"))) == 1
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """That of an environment with this wheel, which finds what else is installed here."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=True)
    made = folder / "bin/python"
    site = say(made, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # a line of a .pth is one more folder to import from; pip counts what lies there as installed
    (Path(site) / "here.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    say(made, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel)
    return made


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(python, tmp_path):
    command = python.with_name("rlhf-fdiv")
    where = say(python, "-P", "-c", "import rlhf_fdiv; print(rlhf_fdiv.__file__)", cwd=tmp_path)
    assert str(python.parent.parent) in where
    assert say(command, "--version", cwd=tmp_path).strip() == rlhf_fdiv.__version__
    for name in ("quickstart", "configs/quickstart.yaml"):
        shown = yaml.safe_load(say(command, "run", name, "--print-config", cwd=tmp_path))
        assert (shown["name"], shown["model"]["name_or_path"]) == ("quickstart", "smollm2-135m")
    say(command, "run", "toy", "name=mine", "policy.max_steps=2", "evaluate.exact=false", cwd=tmp_path)
    assert (tmp_path / "runs/mine/report.md").is_file()
    assert say(command, "ablate", "ablation/toy", "--print-commands", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("extra", IMPORTS)
def test_every_extra_resolves_and_is_imported(extra, wheel, python):
    say(python, "-m", "pip", "install", "-c", ROOT / "constraints.txt", f"{wheel}[{extra}]")
    say(python, "-P", "-c", "import " + ", ".join(IMPORTS[extra]))


def test_what_a_wheel_holds(tmp_path):
    """Every package is named in pyproject.toml, and no config is left out."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for folder in sorted({p.parent for p in (ROOT / "rlhf_fdiv").rglob("*.py")}):
        assert f'"{".".join(folder.relative_to(ROOT).parts)}"' in text
    assert '"rlhf_fdiv.configs"' in text


def test_a_config_here_goes_before_one_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("toy") == ROOT / "configs/toy.yaml" == find_config("configs/toy.yaml")
    assert find_config("ablation/toy") == ROOT / "configs/ablation/toy.yaml"
    Path("toy").write_text("", encoding="utf-8")
    assert find_config("toy") == Path("toy")
    for name in ("quikstart", "configs", "n" * 300, ""):
        assert find_config(name) == Path(name)
        assert problems(config.load, name)[0].startswith(f"{Path(name)}: ")


def test_the_changelog_tells_of_this_version():
    assert f"## {rlhf_fdiv.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_divergences_load_with_torch_alone():
    code = (
        "import torch, sys; before = {*sys.modules}; import rlhf_fdiv.divergences\n"
        "print(*sorted({m.split('.')[0] for m in {*sys.modules} - before}))"
    )
    loaded = say(sys.executable, "-c", code).split()
    known = {*sys.stdlib_module_names, "rlhf_fdiv", "torch", "numpy", "sympy", "mpmath", "typing_extensions", "scipy"}
    assert {m for m in loaded if m not in known} <= set(), loaded
