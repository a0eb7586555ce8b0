"""A module imports only from modules above it, read from the source: the order of the table is the architecture."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_fdiv

ROOT = Path(rlhf_fdiv.__file__).parent
# Units from the ground up; a tuple holds units of one level, which do not import each other. Imports inside functions
# count: they postpone loading, not dependence.
ORDER = (
    "errors",
    "ranges",
    "parts",
    "divergences",
    "sequences",
    ("targets", "estimators"),
    "objectives",
    "optima",
    "assets",
    "film_reviews",
    "known_models",
    "weights",
    "model_options",
    "chat",
    "models",
    "toy",
    "data",
    "reward_models",
    "functions",
    "rewards",
    "scoring",
    "rollout",
    "replay",
    "metrics",
    "config",
    "footprint",
    "plan",
    "checkpoints",
    "tracking",
    "plots",
    "report",
    "hub",
    "cards",
    "comparison",
    "charts",
    "comparison_report",
    "grid",
    "board",
    "stages",
    "library",
    "ablation",
    "verify",
    "cli",
)
LEVEL = {unit: i for i, level in enumerate(ORDER) for unit in ([level] if isinstance(level, str) else level)}
# The same within the packages that have several modules of weight.
INSIDE = {
    "divergences": ("base", "measure", "proofs", "family", "registry"),
    "targets": ("partition", "potentials", "moments"),
    "config": ("files", "options", "checks"),
    "metrics": ("text", "likelihood", "exact", "divergence", "rejection", "harness"),
    "stages": (
        "stopping",
        "inputs",
        "common",
        "saving",
        "training",
        "policy_log",
        "policy_update",
        "policy_server",
        "policy_rollout",
        "sft",
        "reward",
        "policy",
        "prefer",
        "distil",
        "evaluate",
    ),
}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path):
    return ".".join(("rlhf_fdiv", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imports_of(path):
    """Every module of this library that the file imports, at whatever depth, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "rlhf_fdiv")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide where a module lies"
            if (node.module or "").split(".")[0] == "rlhf_fdiv":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    is_module = (ROOT.parent / Path(*whole.split("."))).with_suffix(".py").exists()
                    is_package = (ROOT.parent / Path(*whole.split("."))).is_dir()
                    yield whole if is_module or is_package else str(node.module)


def unit(module):
    return [*module.split("."), ""][1]


def test_every_module_has_its_place_in_the_order():
    units = {unit(module_of(path)) for path in FILES} - {""}
    assert units == set(LEVEL)
    for package, modules in INSIDE.items():
        assert {p.stem for p in (ROOT / package).glob("*.py")} - {"__init__"} == set(modules), package
    assert {p.parent.name for p in FILES if p.name == "__init__.py"} == {*INSIDE, "rlhf_fdiv"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_above(path):
    mine = module_of(path)
    for other in imports_of(path):
        if unit(other) == unit(mine):
            order, parts = INSIDE.get(unit(mine), ()), (mine.split(".")[2:], other.split(".")[2:])
            if all(parts):
                assert order.index(parts[1][0]) < order.index(parts[0][0]), f"{mine} imports {other}"
            else:
                assert not parts[0], f"{mine} imports its own package {other}, which imports it"
        elif unit(mine):  # the package's own __init__ would be above everything: it imports nothing
            assert LEVEL.get(unit(other), -1) < LEVEL[unit(mine)], f"{mine} imports {other}"
        else:
            raise AssertionError(f"rlhf_fdiv/__init__.py imports {other}, so that everything would load everything")


def test_targets_and_estimators_do_not_know_each_other():
    for one, other in (("targets", "estimators"), ("estimators", "targets")):
        for path in [p for p in FILES if unit(module_of(p)) == one]:
            assert other not in {unit(module) for module in imports_of(path)}


def test_nothing_but_what_runs_stages_imports_one():
    for path in FILES:
        if unit(module_of(path)) not in ("stages", "library", "ablation", "verify", "cli"):
            assert "stages" not in {unit(module) for module in imports_of(path)}, path


HEAVY = ("transformers", "trl", "peft", "datasets", "accelerate", "matplotlib", "pandas")


def test_light_imports_stay_light():
    """The divergences need torch alone, and a config is checked before any other deep-learning library is loaded."""
    code = (
        "import sys\n"
        "import rlhf_fdiv\nprint('torch' in sys.modules)\n"
        f"heavy = {HEAVY!r}\n"
        "for name in ('divergences', 'objectives', 'estimators', 'targets', 'config', 'tracking', 'cli'):\n"
        "    __import__('rlhf_fdiv.' + name)\n"
        "    print(name, *[x for x in heavy if x in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    first, *loaded = done.stdout.splitlines()
    assert first == "False", "importing the package alone loads nothing"
    found = {line.split()[0]: line.split()[1:] for line in loaded}
    assert found["divergences"] == found["objectives"] == found["estimators"] == found["targets"] == []
    assert not {"transformers", "trl"} & {*found["config"], *found["tracking"], *found["cli"]}


@pytest.mark.parametrize("path", sorted((ROOT.parent / "configs/accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_launch_configs_say_what_their_names_do(path):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser, prepare_multi_gpu_env

    args = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    args, *_ = _validate_launch_command(args)
    env = prepare_multi_gpu_env(args)
    sharded = path.stem == "fsdp2"
    assert args.num_processes == {"one_gpu": 1, "multi_node": 32}.get(path.stem, 8)
    assert (args.use_fsdp, env.get("FSDP_VERSION")) == ((True, "2") if sharded else (False, None))
    assert env.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false") == "false"
    assert env["ACCELERATE_MIXED_PRECISION"] == "no"
    assert args.use_deepspeed == path.stem.startswith("zero")
    if args.use_deepspeed:
        assert str(args.zero_stage) == path.stem[-1]
        flags = (args.zero3_init_flag, args.zero3_save_16bit_model)
        assert flags == ((False, True) if args.zero_stage == 3 else (None, None))


def test_the_shell_scripts_pass_their_linter():
    scripts = [p for folder in ("scripts", "benchmarks") for p in sorted((ROOT.parent / folder).glob("*.sh"))]
    assert len(scripts) == 2
    subprocess.run([Path(sys.executable).with_name("shellcheck"), *scripts, ROOT.parent / ".ci/run"], check=True)
