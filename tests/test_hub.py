"""Cards say what the run folder says and nothing of this machine; what a hub then holds is the model folder, byte by byte."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
import yaml
from fake_hub import TOKEN, fake_hub
from huggingface_hub import ModelCard, ModelCardData
from tiny import problems, run, write_config
from transformers import AutoModelForCausalLM

from rlhf_fdiv import config, hub
from rlhf_fdiv.cards import card, licence_of, shareable, write_cards
from rlhf_fdiv.tracking import RunFolder

QUICKSTART = Path(__file__).parent.parent / "results/quickstart"
APACHE = {"license": "apache-2.0"}


def values(loaded: ModelCard) -> dict:
    return {result.metric_type: (result.metric_value, result.metric_args) for result in loaded.data.eval_results}


# the card, from a run folder


def test_the_card_of_a_real_run_says_what_its_folder_says():
    text = str(card(QUICKSTART, "policy", "model", APACHE))
    measured = json.loads((QUICKSTART / "evaluate/metrics.json").read_text())
    loaded = ModelCard(text)
    data = loaded.data
    assert (data.license, data.base_model) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (data.model_name, data.pipeline_tag) == ("quickstart", "text-generation")
    assert {"rlhf_fdiv", "reverse_kl", "match"} <= set(data.tags)
    assert data.datasets is None, "the reviews are in no dataset of a hub"
    found = values(loaded)
    for where in ("reference", "target"):
        x = measured[f"divergence_to_{where}"]["reverse_kl"]
        assert found[f"reverse_kl to the {where}, nats"] == (x["value"], {"standard_error": x["standard_error"]})
    assert not any(key.startswith("forward_kl") for key in found), "what is withheld is no result"
    assert found["objective"] == (measured["policy"]["objective"], None)
    assert "divergence `reverse_kl`" in text
    assert "target `tilted` with β = 0.15" in text
    assert "| reverse_kl | 6.87 ± 0.2 | 3.48 ± 0.32 |" in text
    assert "| forward_kl | not measurable: too heavy a tail" in text
    assert "| objective | 0.0345 | 0.986 | 0.951 ± 0.079 |" in text
    manifest = json.loads((QUICKSTART / "manifest.json").read_text())
    assert (
        f"| prompts_train | `film_reviews/prompts_train.jsonl` | {manifest['data_sha256']['prompts_train']} |" in text
    )
    for word in (*manifest["versions"].values(), manifest["git_commit"], "rlhf-fdiv run resolved_config.yaml"):
        assert word in text


def test_a_dataset_of_the_hub_is_named_as_one(tmp_path):
    raw = config.files.read_yaml(QUICKSTART / "resolved_config.yaml")
    (tmp_path / "saved").mkdir()  # as `Dataset.save_to_disk` does
    raw["data"] |= {"sft_train": "owner/texts", "prompts_train": "owner/prompts"}
    raw["data"]["preferences_train"] = str(tmp_path / "saved")
    write_config(tmp_path / "resolved_config.yaml", raw)
    manifest = json.loads((QUICKSTART / "manifest.json").read_text())
    manifest["data_sha256"] |= {"sft_train": "", "prompts_train": "", "preferences_train": ""}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert card(tmp_path, "policy", "model", {}).data.datasets == ["owner/prompts"]
    assert card(tmp_path, "sft", "model", {}).data.datasets == ["owner/texts"]
    assert card(tmp_path, "reward", "model", {}).data.datasets is None


def test_the_metadata_are_those_that_huggingface_hub_takes():
    data = card(QUICKSTART, "policy", "model", APACHE).data
    again = ModelCardData(**yaml.safe_load(data.to_yaml()))  # raises where a field is wrong
    assert again.to_dict() == data.to_dict()


def test_the_config_in_the_card_is_the_runs_own():
    text = str(card(QUICKSTART, "policy", "model", {}))
    (inside,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    raw = config.files.read_yaml(QUICKSTART / "resolved_config.yaml")
    assert config.parse(yaml.safe_load(inside) | {"stages": raw["stages"]}) == config.parse(raw)
    assert "Not known: the base model's card names none" in text


def test_without_an_evaluation_the_card_says_so(tmp_path):
    for name in ("resolved_config.yaml", "manifest.json"):
        (tmp_path / name).write_text((QUICKSTART / name).read_text())
    for stage, task in (("sft", "text-generation"), ("reward", "text-classification"), ("policy", "text-generation")):
        loaded = card(tmp_path, stage, "model", {})
        assert loaded.data.pipeline_tag == task
        assert loaded.data.model_name == ("quickstart" if stage == "policy" else f"quickstart-{stage}")
        assert "Nothing but its training, so far." in str(loaded)
        assert "model-index" not in str(loaded)
        assert ".png" not in str(loaded)
        assert ("forward_kl" if stage != "policy" else "reverse_kl") in loaded.data.tags


@pytest.mark.slow
def test_a_card_is_written_with_its_training_and_completed_with_what_was_measured(tmp_path):
    for name in ("resolved_config.yaml", "manifest.json"):
        shutil.copyfile(QUICKSTART / name, tmp_path / name)
    made = [tmp_path / name for name in ("sft/model", "reward/model", "policy/model", "policy/adapter")]
    for folder in made:
        folder.mkdir(parents=True)
        shutil.copyfile(QUICKSTART / f"{folder.parent.name}_metrics.jsonl", folder.parent / "metrics.jsonl")
    for stage in ("sft", "reward", "policy"):
        write_cards(tmp_path, stage)
    pictures = {folder: re.findall(r"!\[\w+\]\((\S+)\)", (folder / "README.md").read_text()) for folder in made}
    assert list(pictures.values()) == [["training.png"], [], ["training.png"], ["training.png"]], "a fit has no steps"
    before = [(folder / "README.md").read_text() for folder in made]
    shutil.copytree(QUICKSTART / "evaluate", tmp_path / "evaluate")
    write_cards(tmp_path, "evaluate")
    for folder, text in zip(made, before, strict=True):
        now = (folder / "README.md").read_text()
        if folder.parent.name == "policy":
            assert re.findall(r"!\[\w+\]\((\S+)\)", now) == ["before_and_after.png", "training.png"]
            picture = QUICKSTART / "evaluate/before_and_after.png"
            assert (folder / picture.name).read_bytes() == picture.read_bytes()
            assert "| reverse_kl | 6.87 ± 0.2 | 3.48 ± 0.32 |" in now
            assert "6.87" not in text
        else:
            assert now == text, "a finished stage stays as it is"


def test_paths_become_names_and_secrets_go(tmp_path, monkeypatch):
    (tmp_path / "near/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked = {
        "model": str(tmp_path / "base"), "teacher": "~/models/big/", "data": "../x/rows.jsonl", "near": "near/here",
        "hub": "owner/name", "made": "film_reviews/gold.jsonl", "pattern": r"\b(a/b)\b", "long": "x" * 10_000,
        "args": {"hub_token": "hf_1", "eos_token": "<e>", "list": ["/a/b", 1, None]}, "API_KEY": "k",
    }  # fmt: skip
    told = shareable(asked)
    assert told.pop("args") == {"eos_token": "<e>", "list": ["b", 1, None]}
    assert told == {k: asked[k] for k in ("hub", "made", "pattern", "long")} | {
        "model": "base",
        "near": "here",
        "teacher": "big",
        "data": "rows.jsonl",
    }


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\n# x", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: own\n---\n", {"license": "other", "license_name": "own"}),
        ("---\nlicense_name: own\n---\n", {}),
        ("---\ntags: [a]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("no front matter", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_the_licence_is_what_the_base_models_card_says(tmp_path, text, licence):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert licence_of(str(tmp_path)) == licence
    assert licence_of("HuggingFaceTB/SmolLM2-135M-Instruct") == APACHE, "without a hub"
    data = card(QUICKSTART, "policy", "model", licence).data
    assert {k: v for k, v in data.to_dict().items() if k.startswith("license")} == licence


# what is asked before anything runs


@pytest.fixture
def signed_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def raw(start, data, tmp_path):
    raw = tiny.raw_config(start, data, tmp_path / "runs") | {"stages": ["policy"], "report_to": "none"}
    raw["scorers"] = {"praise": {"name": "pattern", "pattern": tiny.PATTERN}}
    raw["target"]["reward"], raw["policy"]["model"] = "praise", start
    return raw


@pytest.mark.parametrize("repo", ["alone", "a/b/c", "./a/b", "a b/c", "-a/b", "a/b.git", "https://hub/a"])
def test_a_name_that_is_none_stops_the_run_before_it_begins(raw, tmp_path, signed_in, repo):
    (message,) = problems(run, write_config(tmp_path / "a.yaml", raw), f"push_to_hub={repo}")
    assert "names no repository: write owner/name" in message
    assert not (tmp_path / "runs").exists()


def test_so_do_a_missing_token_and_a_hub_that_is_shut_off(raw, tmp_path, monkeypatch):
    path = write_config(tmp_path / "a.yaml", raw | {"push_to_hub": "me/tiny"})
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "no token of the hub here: run `hf auth login`, or set HF_TOKEN" in problems(run, path)[0]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in problems(run, path)[0]
    assert not (tmp_path / "runs").exists()


def test_the_keys_are_known_shown_and_free_to_change(raw, tmp_path, call, signed_in):
    path = write_config(tmp_path / "a.yaml", raw)
    out = call("run", path, "--print-config")[1]
    assert "push_to_hub: null\nhub_private_repo: true\n" in out
    assert "push_to_hub: Input should be a valid string, not True" in call("run", path, "push_to_hub=true")[2]
    RunFolder(config.load(path)).prepare()
    RunFolder(config.load(path, ["push_to_hub=me/tiny", "hub_private_repo=false"])).require_same_config()


def test_a_grid_is_no_repository(raw, tmp_path, call):
    write_config(tmp_path / "a.yaml", raw | {"push_to_hub": "me/tiny"})
    grid = write_config(tmp_path / "grid.yaml", {"config": "a.yaml", "grid": {"seed": [0, 1]}})
    code, _, err = call("ablate", grid)
    assert code == 2
    assert "push_to_hub: every cell of a grid would go into this one repository" in err


# pushing


@pytest.fixture
def server(monkeypatch, signed_in):
    with fake_hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield server


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".bin"}


@pytest.fixture
def finished(raw, tmp_path):
    """A run whose policy stage is over, as far as pushing needs it."""
    path = write_config(tmp_path / "a.yaml", raw | {"push_to_hub": "me/tiny"})
    folder = RunFolder(config.load(path))
    folder.prepare()
    with folder.running("policy") as out:
        (out / "model").mkdir()
        (out / "model/model.safetensors").write_bytes(os.urandom(100_000))
        (out / "model/README.md").write_text("---\nlicense: mit\n---\n# x\n")
        (out / "model/training_args.bin").write_bytes(b"pickled")
    return path


def test_a_second_call_pushes_alone_and_an_unchanged_model_makes_no_commit(finished, server, tmp_path, call):
    model = tmp_path / "runs/a/policy/model"
    code, out, _ = call("run", finished)
    assert code == 0
    assert "policy: finished before, skipped" in out
    assert f"push_to_hub: {model} is at {server.url}/me/tiny" in out
    assert server.repos == {"me/tiny": files(model)}
    assert server.private == {"me/tiny": True}
    assert call("run", finished)[0] == 0
    assert server.commits == ["policy stage of a"]
    call("run", finished, "push_to_hub=me/open", "hub_private_repo=false")
    assert server.private["me/open"] is False


@pytest.mark.parametrize("refused", ["/repos/create", "/preupload/", "/storage/", "/commit/", "everything"])
def test_what_a_hub_refuses_is_lost_nowhere_and_told_with_the_command(finished, server, tmp_path, call, refused):
    model = tmp_path / "runs/a/policy/model"
    before = files(model)
    server.refused = ("/",) if refused == "everything" else (refused,)
    code, _, err = call("run", finished)
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert "push_to_hub: me/tiny did not take the model" in err
    assert "403" in err
    assert f"hf upload me/tiny {model} . --private" in err
    assert TOKEN not in err, "a hub may well repeat what it was sent"
    assert files(model) == before
    server.refused = ()
    assert call("run", finished)[0] == 0
    assert server.repos["me/tiny"] == before


def test_a_hub_that_does_not_answer_is_told_likewise(finished, server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    (message,) = problems(run, finished)
    assert "did not take the model ([Errno 111] Connection refused" in message


def test_a_token_that_the_hub_does_not_know_is_told_and_not_shown(finished, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired_and_secret")
    (message,) = problems(run, finished)
    assert "401" in message
    assert "hf_expired" not in message


def test_a_run_without_a_language_model_pushes_nothing(raw, tmp_path, server, monkeypatch):
    path = write_config(tmp_path / "a.yaml", raw | {"push_to_hub": "me/tiny", "stages": ["reward"]})
    folder = RunFolder(config.load(path))
    assert "so nothing is pushed" in hub.push(config.load(path), folder)
    assert not server.requests


# a whole run


@pytest.fixture(scope="module")
def whole(start, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (Path(start) / "README.md").write_text("---\nlicense: mit\n---\n# a tiny model\n")
    raw = tiny.raw_config(start, data, folder / "runs")
    raw["sft"]["training_args"] = {"hub_token": "hf_in_the_config", "logging_steps": 1}
    path = write_config(folder / "a.yaml", raw)
    return path, run(path).path


@pytest.mark.slow
def test_every_model_of_a_run_has_a_card_with_what_was_measured_and_a_picture(whole, start, data):
    _, folder = whole
    made = [p.parent for p in folder.glob("*/*/README.md")]
    assert {str(p.relative_to(folder)) for p in made} == {
        "sft/model",
        "reward/model",
        "policy/model",
        "policy/adapter",
    }
    for model in made:
        text = (model / "README.md").read_text()
        loaded = ModelCard.load(model / "README.md")
        assert (loaded.data.license, loaded.data.base_model) == ("mit", Path(start).name)
        pictures = re.findall(r"!\[\w+\]\((\S+)\)", text)
        assert pictures == sorted(p.name for p in model.glob("*.png"))
        assert ("training.png" in pictures) == (model.parent.name != "reward")
        assert ("before_and_after.png" in pictures) == (model.parent.name == "policy")
        for path in (str(folder), str(Path(start).parent), str(Path(data["gold"]).parent)):
            assert path not in text
        assert "hf_in_the_config" not in text
        assert str(card(folder, model.parent.name, model.name, {"license": "mit"})) == text, "of the folder alone"
    for model, library in {
        "policy/model": "transformers",
        "policy/adapter": "peft",
        "reward/model": "rlhf_fdiv",
    }.items():
        assert ModelCard.load(folder / model / "README.md").data.library_name == library
    measured = json.loads((folder / "evaluate/metrics.json").read_text())
    assert values(ModelCard.load(folder / "policy/model/README.md"))["gold"][0] == measured["policy"]["gold"]
    accuracy = json.loads((folder / "reward/accuracy.json").read_text())["accuracy"]
    assert values(ModelCard.load(folder / "reward/model/README.md")) == {"accuracy": (accuracy, None)}


@pytest.mark.slow
def test_what_is_pushed_is_the_folder_and_transformers_loads_it_from_there(whole, tmp_path):
    """In processes of their own, which huggingface_hub's own variables point at the hub."""
    path, folder = whole
    with fake_hub() as server:
        env = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
                            "HF_HOME": str(tmp_path / "home")}  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "rlhf_fdiv.cli", "run", path, "push_to_hub=me/tiny"],
                              env=env, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "evaluate: finished before, skipped" in done.stdout
        model = folder / "policy/model"
        assert server.repos["me/tiny"] == files(model)
        assert {"README.md", "before_and_after.png", "model.safetensors", "tokenizer.json"} <= set(files(model))
        load = (
            "from transformers import AutoModelForCausalLM as M; M.from_pretrained('me/tiny').save_pretrained('loaded')"
        )
        subprocess.run([sys.executable, "-c", load], env=env, check=True, cwd=tmp_path)
    assert tiny.same(tiny.weights(tmp_path / "loaded"), tiny.weights(model))
    assert isinstance(AutoModelForCausalLM.from_pretrained(model), torch.nn.Module)
    for file in (p for p in folder.rglob("*") if p.is_file()):
        assert TOKEN.encode() not in file.read_bytes(), file


@pytest.mark.slow
@pytest.mark.distributed
def test_of_several_processes_one_pushes(whole, monkeypatch):
    path, folder = whole
    with fake_hub() as server:
        for name, value in {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}.items():
            monkeypatch.setenv(name, value)
        tiny.two_processes("-m", "rlhf_fdiv.stages.policy", path, "push_to_hub=me/two")
        assert server.repos["me/two"] == files(folder / "policy/model")
        assert [x for x in server.requests if x[1] == "/api/repos/create"] == [("POST", "/api/repos/create")]
