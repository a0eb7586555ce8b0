"""The documents show what there is: Python runs, YAML is a config, commands parse, keys exist, links lead somewhere."""

import dataclasses
import functools
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
import yaml
from markdown_it import MarkdownIt

from rlhf_fdiv import cli, grid
from rlhf_fdiv import config as configs
from rlhf_fdiv.config.checks import _CHOICES, _SECTIONS, TOP_LEVEL
from rlhf_fdiv.divergences import registry

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "results/README.md", ROOT / "benchmarks/RESULTS.md"]
)

# What is shown and not run: its beginning, and why
NOT_RUN = {
    "hf auth login": "asks for a secret",
    "vllm serve": "a program of another environment; tests/test_vllm.py speaks its interface",
    "wandb sync": "uploads",
    "apt install": "of the machine",
    "jupytext --sync": "tests/test_notebooks.py holds what it syncs",
}
NO_CONFIGS = {"task:": "a task file of lm-eval, of the form that tests/test_harness.py runs"}
RUN_THERE = {"library.md": "tests/test_align.py"}  # pages whose Python takes longer, and the test that runs it
PROGRAMS = (
    "cd",
    "rlhf-fdiv",
    "make",
    "accelerate",
    "pip",
    "python",
    "pytest",
    ".ci/run",
    *(x.split()[0] for x in NOT_RUN),
)
FILLED_IN = {  # what a reader fills in
    "CONFIG": "configs/quickstart.yaml",
    "NAME": "quickstart",
    "STAGE": "policy",
    "FOLDER_OR_HUB_NAME": "owner/name",
    "FILE": "prompts.jsonl",
    "N": "8",
}


def of_page(*kinds):
    """One case a page that has any, with the texts of its blocks of these kinds."""
    cases = [(page, [text for kind, text in parts(page) if kind in kinds]) for page in PAGES]
    return pytest.mark.parametrize(
        ("page", "texts"), [pytest.param(p, t, id=str(p.relative_to(ROOT)), marks=slow_if(t)) for p, t in cases if t]
    )


def slow_if(texts):
    """TRL takes seconds to load."""
    return [pytest.mark.slow] if any("from trl " in text for text in texts) else []


def tokens(page):
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def parts(page):
    """(kind, text) of every block and span of code: by its language, `shell` for a block without one, or `inline`."""
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            kind = token.info.strip() or ("json" if token.content.startswith("{") else "shell")
            yield "shell" if kind in ("bash", "sh", "console") else kind, token.content
        elif token.type == "code_inline":
            yield "inline", token.content


def names_of(page):
    """What the Python blocks of a page define, one after the other."""
    names: dict = {}
    for kind, block in parts(page):
        if kind == "python":
            exec(compile(block, page.name, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@of_page("python")
def test_every_python_block_runs(page, texts, monkeypatch):
    monkeypatch.chdir(ROOT)
    if page.name in RUN_THERE:
        assert page.name in (ROOT / RUN_THERE[page.name]).read_text(encoding="utf-8")
    else:
        names_of(page)


@of_page("json", "jsonl")
def test_every_json_block_is_rows_of_json(page, texts):
    for text in texts:
        while text := text.strip():
            text = text[json.JSONDecoder().raw_decode(text)[1] :]


@of_page("yaml")
def test_every_yaml_block_is_a_config(page, texts, tmp_path, monkeypatch):
    """A whole one, an ablation, or keys on top of the quickstart; `mypkg.mod:name` is what the page's Python defines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "docs/examples")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for block in texts:
        if block.startswith(tuple(NO_CONFIGS)):
            continue
        for module in (
            m for m in re.findall(r"([\w.]+):[A-Z]\w*", block) if not (ROOT / f"docs/examples/{m}.py").exists()
        ):
            monkeypatch.setitem(sys.modules, module, SimpleNamespace(**names_of(page)))
        if "\ngrid:" in f"\n{block}":
            path = tmp_path / "configs/ablation/of_the_page.yaml"
            path.write_text(block, encoding="utf-8")
            every_value(path)
        else:
            raw = yaml.safe_load(block)
            base = "" if {"base", "model"} & raw.keys() else "base: configs/quickstart.yaml\n"
            path = tmp_path / f"{raw.get('name', 'of_the_page')}.yaml"  # which a later one may be based on
            path.write_text(base + block, encoding="utf-8")
            configs.load(path)


@functools.cache
def every_value(path, *overrides):
    """The cells of an ablation whose values are each taken once, not their product; seeds but the first."""
    ablation = grid.load(path, list(overrides))
    for key in ablation.grid.keys() - {"seed"}:
        only = {k: v if k == key else v[:1] for k, v in ablation.grid.items()}
        assert grid.grid_cells(dataclasses.replace(ablation, grid=only))


def commands(kind, text):
    """The commands of a block or a span of code, as words; a line of a block that is none must be a formula."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"^(\$ |(\w+=\S+ )*)(\.venv/bin/|bash )?", "", line.strip())
        if re.split(r"\s", line)[0] in PROGRAMS:
            for one in re.split(r" \| | && ", line):
                yield shlex.split(_plain(one), comments=True)
        elif kind == "shell":
            assert line.startswith("#") or not line or not line.isascii(), (
                f"{line!r} is neither a command of {PROGRAMS} nor a formula"
            )


def _plain(line):
    """Without what a page puts around words: [optional], what goes on …, and the names that a reader fills in."""
    line = re.sub(r"(?<!\S)\[([^\]]*)\](?!\S)", r"\1", line).replace("a.b=value", "").replace("…", "")
    return re.sub(r"\b[A-Z_]{1,}\b(?![=_])", lambda m: FILLED_IN.get(m[0], m[0]), line)


@of_page("shell", "inline")
def test_every_command_is_one(page, texts, monkeypatch, tmp_path):
    """Everything but the run itself: programs, options, files, extras, and the configs with their overrides."""
    monkeypatch.syspath_prepend(ROOT / "docs/examples")
    own = {}  # the configs that the page itself shows
    for block in (text for kind, text in parts(page) if kind == "yaml"):
        if named := re.match(r"name: (\w+)\n", block):
            own[f"{named[1]}.yaml"] = tmp_path / f"{named[1]}.yaml"
            own[f"{named[1]}.yaml"].write_text(block, encoding="utf-8")
    for kind, text in parts(page):
        monkeypatch.chdir(ROOT)
        if kind in ("shell", "inline"):
            for words in ([str(own.get(word, word)) for word in line] for line in commands(kind, text)):
                if words[0] == "cd":
                    monkeypatch.chdir(words[1])
                for alternative in words[1].split("|") if len(words) > 1 else ("",):
                    check(words[:1] + [alternative] * (len(words) > 1) + words[2:])


def check(words):
    program, *rest = words
    line = " ".join(words)
    if line.startswith(tuple(NOT_RUN)) or not rest:
        return
    if program == "rlhf-fdiv" and not rest[0].startswith("-"):
        command = typer.main.get_command(cli.app).commands[rest[0]]
        if not rest[1:]:
            return
        given = command.make_context(rest[0], rest[1:]).params  # raises for an unknown option
        if file := given.get("grid"):
            every_value(file, *(given["overrides"] or []))
        elif command.params[0].name == "config":
            file = given["config_option"] or given["config"]
            stage = [f"stages=[{x}]" for x in rest[:1] if x in configs.STAGES]
            if file == FILLED_IN["CONFIG"] and rest[0] in ("prefer", "distil"):
                file = f"configs/{rest[0]}.yaml"
            configs.load(file, [*(given["overrides"] or []), *stage])
    elif program == "make":
        subprocess.run(["make", "-n", rest[0]], cwd=ROOT, check=True, capture_output=True)
    elif program == "accelerate" and rest[0] == "launch":
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(rest[1:])
        assert args.config_file is None or Path(args.config_file).is_file()
        script = args.training_script.replace(".", "/") + ".py" if args.module else args.training_script
        assert Path(script).is_file(), line
        if args.training_script_args:
            configs.load(
                args.training_script_args[0], [*args.training_script_args[1:], f"stages=[{Path(script).stem}]"]
            )
    elif program == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        found = [x for part in re.findall(r"rlhf_fdiv\[(.*?)\]", line) for x in part.split(",")]
        assert set(found) <= set(extras), line
    elif program == "python" and rest[0].endswith(".py"):
        source = Path(rest[0]).read_text(encoding="utf-8")
        missing = [word for word in rest[1:] if word.startswith("--") and word.split("=")[0] not in source]
        assert not missing, line


@pytest.mark.parametrize("words", [["divergences"], ["config-schema"], ["--version"], ["--help"]], ids=" ".join)
def test_what_only_tells_is_run(call, words):
    code, out, _ = call(*words)
    assert code == 0
    assert out


def toy_runs():
    """The commands of the pages that run the toy, whose language is small enough to run it here too."""
    found = [words for page in PAGES for kind, text in parts(page) if kind == "shell" for words in commands(kind, text)]
    return [" ".join(words[1:]) for words in found if words[0] == "rlhf-fdiv" and "configs/toy.yaml" in words]


@pytest.mark.slow
def test_what_runs_the_toy_is_run_in_its_order(call, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    assert toy_runs()
    for line in dict.fromkeys(toy_runs()):
        code, _, told = call(
            *shlex.split(line), "policy.max_steps=2", "policy.save_steps=2", "evaluate.num_generations=4"
        )
        assert code == 0, (line, told)


# keys

FIELDS = {name: {x.name: x.type for x in dataclasses.fields(cls)} for name, cls in _SECTIONS.items()}
KEY = re.compile(r"([a-z_]+)((?:\.[a-z_A-Z]+)*)(?:=(\S.*))?")


def known(first, rest):
    """Whether a dotted key is one: of a section, of any of a choice's kinds, or of a scorer."""
    if first not in FIELDS and not rest:
        return first in TOP_LEVEL
    if first in FIELDS:
        return not rest or rest[0] in FIELDS[first]
    kinds = _CHOICES.get(first, {}).values()
    return first in ("scorers", "divergence") or any(rest[0] in {x.name for x in dataclasses.fields(k)} for k in kinds)


@of_page("inline")
def test_every_key_that_is_named_exists(page, texts):
    """`section.key`, `key=value` and `section.key=value`."""
    metrics = {"policy.objective", "policy.gold", "policy.reward"}  # of metrics.json, which look the same
    wrong = []
    for text in texts:
        found = KEY.fullmatch(text)
        if not found or text in metrics or text.endswith((".py", ".json", ".jsonl", ".md", ".yaml", ".txt", ".sh")):
            continue
        first, rest, value = found[1], found[2].split(".")[1:], found[3]
        if (rest and (first in FIELDS or first in _CHOICES)) or (value is not None and first in TOP_LEVEL):
            wrong += [] if known(first, rest) else [text]
    assert not wrong


# the peers' names


@pytest.mark.slow
def test_the_arguments_of_trl_are_those_of_the_installed_one():
    """The first cell of each table's head names classes of TRL; the code in the first cell of each row, their fields."""
    import trl

    found = 0
    fields: set | None = None
    for heads, cells in rows(ROOT / "docs/coming_from_trl.md"):
        if heads:
            classes = [re.sub(r"^.*\.", "", name) for name in cells[0]]
            where = {"GKDConfig": "trl.experimental.gkd"}
            loaded = [
                getattr(importlib.import_module(where.get(c, "trl")) if c in where else trl, c, None) for c in classes
            ]
            fields = {x.name for c in loaded if dataclasses.is_dataclass(c) for x in dataclasses.fields(c)} or None
        elif fields:
            unknown = {name.split("=")[0] for name in cells[0]} - fields
            assert not unknown, f"{cells}: not a field"
            found += len(cells[0])
    assert found > 30


def rows(page):
    """(is it a head, the code spans of each cell) of every row of every table."""
    head, cells, inside = False, [], False
    for token in tokens(page):
        if token.type == "tr_open":
            cells, head = [], False
        elif token.type in ("th_open", "td_open"):
            cells.append([])
            head, inside = token.type == "th_open", True
        elif token.type in ("th_close", "td_close"):
            inside = False
        elif token.type == "code_inline" and inside:
            cells[-1].append(token.content)
        elif token.type == "tr_close":
            yield head, cells


# links


def links(page):
    yield from (
        str(t.attrs.get("href") or t.attrs.get("src")) for t in tokens(page) if t.type in ("link_open", "image")
    )


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    flat = list(tokens(page))
    titles = [flat[i + 1].content for i, t in enumerate(flat) if t.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_and_every_named_file_exists(page):
    missing = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        if "://" in link:
            parsed = urllib.parse.urlsplit(link)
            missing += [] if parsed.scheme == "https" and "." in parsed.netloc and " " not in link else [link]
            continue
        target = (page.parent / urllib.parse.unquote(path)).resolve() if path else page
        if not target.exists() or (anchor and urllib.parse.unquote(anchor) not in anchors(target)):
            missing.append(link)
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\b((?:configs|docs|tests|results|scripts|benchmarks|notebooks|rlhf_fdiv)/[\w./]+\.\w+)", text)
    missing += [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert not missing


@pytest.mark.slow
def test_every_page_of_the_web_that_is_linked_answers():
    """404 and 410 are a wrong address; a site that is not reached, or will not be asked by a program, says nothing."""
    reached, gone = 0, []
    for link in sorted({link.split("#")[0] for page in PAGES for link in links(page) if "://" in link}):
        request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0 (link check)"})
        try:
            with urllib.request.urlopen(request, timeout=15):
                reached += 1
        except urllib.error.HTTPError as error:
            reached += 1
            gone += [link] if error.code in (404, 410) else []
        except OSError:
            if not reached:
                pytest.skip("no network")
    assert not gone


# what there is to read


def test_the_first_pages_are_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
    assert len((ROOT / "README.zh.md").read_text(encoding="utf-8").splitlines()) <= 90


def figures_of(run):
    """Every figure of a run's evaluation, to any number of digits, plain and in percent."""
    values, found = [json.loads((ROOT / f"results/{run}/evaluate/metrics.json").read_text(encoding="utf-8"))], set()
    while values:
        value = values.pop()
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        if isinstance(value, float):
            found |= {f"{x:.{digits}f}".replace("-", "−") for x in (value, 100 * value) for digits in range(4)}
    return found


def test_the_tables_of_the_readme_hold_the_figures_of_the_runs_they_name():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| | before (SFT)"))
    rows = dict.fromkeys(lines[first + 2 : first + 9], "quickstart")
    for head, run in {"SFT": "rlhf", "ppo": "ppo", "rlhf": "rlhf", "gdc": "gdc"}.items():
        rows |= {line: run for line in lines if line.startswith(f"| {head} |")}
    assert len(rows) == 11
    for line, run in rows.items():
        figures = set(re.findall(r"−?\d+(?:\.\d+)?", line.split("|", 2)[2])) - {"0"}
        assert figures <= figures_of(run), (line, figures - figures_of(run))


def test_the_chinese_page_has_the_figures_and_commands_of_the_english_one():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    english = english.replace(",", "")
    cells = [cell for line in chinese.splitlines() if line.startswith("|") for cell in line.split("|")]
    figures = {x for cell in cells for x in re.findall(r"−?\d+(?:\.\d+)?", cell)}
    assert figures
    assert not {x for x in figures if x not in english}
    blocks = [text for kind, text in parts(ROOT / "README.zh.md") if kind == "shell"]
    theirs = [line.partition("#")[0].strip() for text in blocks for line in text.splitlines()]
    assert theirs
    assert not [line for line in theirs if line not in english]


def test_every_page_is_on_the_reading_path():
    index = ROOT / "docs/index.md"
    reached = {(index.parent / link.partition("#")[0]).resolve() for link in links(index) if "://" not in link}
    assert {*ROOT.glob("docs/*.md")} - {index} <= reached
