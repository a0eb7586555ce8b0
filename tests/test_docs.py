"""Every Python block of the documents runs (those of docs/library.md in test_align.py), and every file that they name is
there."""

import re
from pathlib import Path

import pytest

from rlhf_fdiv.divergences import registry

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "library.md"], ids=lambda p: p.name)
def test_every_python_block_runs(page, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_and_every_named_file_exists(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"\b((?:configs|docs|tests|results|scripts|rlhf_fdiv)/[\w./]+\.\w+)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing
