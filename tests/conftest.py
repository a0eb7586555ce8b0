"""What several test files start from: a tiny model, its data, and the console script."""

import sys

import pytest
import tiny

from rlhf_fdiv import cli


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("model") / "start")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.data_files(tmp_path_factory.mktemp("data"))


@pytest.fixture
def call(monkeypatch, capsys):
    """call("run", …) → exit code, stdout, stderr of the console script."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf-fdiv", *words])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call
