"""What several test files start from: a tiny model, its data, and the console script."""

import os
import sys

import pytest
import tiny
import torch
from hypothesis import HealthCheck, settings

from rlhf_fdiv import cli

# on a busy machine an example takes what it takes; CI=1 makes the examples the same each time
patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("patient", settings.get_profile("ci" if os.environ.get("CI") else "default"), **patient)
settings.load_profile("patient")


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where tests/test_device.py runs")


def pytest_collection_modifyitems(items):
    """The quickstart takes as long as half of all the others: it comes first, and they run beside it."""
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")


@pytest.fixture
def device(request):
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda: there is no CUDA device here")
    return torch.device(name)


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
