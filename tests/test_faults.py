"""Kills, signals and damage: what is left of a run, and that it goes on as if nothing had been."""

import ctypes
import http.server
import json
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import completions, jsonl, problems, run, write_config

from rlhf_fdiv.checkpoints import checkpoints, require_whole, step_of
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.models import Policy
from rlhf_fdiv.stages.stopping import STOPPED_EXIT_CODE

pytestmark = pytest.mark.faults

PROCESSES = multiprocessing.get_context("forkserver")  # pays for the imports once
PROCESSES.set_forkserver_preload(["tiny", *(f"rlhf_fdiv.stages.{s}" for s in ("sft", "reward", "policy", "evaluate"))])
ALL = "stages=[sft, reward, policy, evaluate]"
PPO = "estimator={name: ppo, num_epochs: 2, num_minibatches: 2}"
MOMENTS = "target={name: moments, moments: {praise: 0.5}, num_prompts: 4, num_generations: 8, dual_learning_rate: 0.3}"
RUNS = {
    "all stages": (ALL, PPO, "policy.save_steps=1", "sft.save_steps=2", "report_to=none"),
    "moments, replay": ("stages=[policy]", MOMENTS, "policy.replay_steps=2", "policy.save_steps=1", "report_to=none"),
    "prefer": ("stages=[prefer]", "objective=prefer", "prefer.max_steps=5", "prefer.save_steps=1", "report_to=none"),
    "distil": ("stages=[distil]", "objective=distil", "distil.max_steps=5", "distil.save_steps=1", "report_to=none"),
}


@pytest.fixture(scope="module")
def config(start, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    raw = tiny.raw_config(start, data, folder / "runs")
    raw |= {"prefer": {"num_pairs": 4, "max_completion_length": 6}, "distil": {"num_prompts": 4, "teacher": start}}
    raw["distil"]["max_completion_length"] = 6
    return write_config(folder / "faults.yaml", raw)


def process(*args):
    """A started process that runs the stages of a config."""
    made = PROCESSES.Process(target=tiny.run, args=args)
    made.start()
    return made


def equal(a, b) -> bool:
    """Of what torch.load gives, to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b)) if hasattr(a, "shape") else a == b


def same_folder(one: Path, two: Path) -> None:
    """Everything that a stage leaves behind, but for the time that it took, down to the bits of optimiser and generators."""
    names = [sorted(str(p.relative_to(x)) for p in x.rglob("*") if p.is_file()) for x in (one, two)]
    assert names[0] == names[1]
    of_time = ("finished.json", "training_args.bin", "trainer_state.json", "report.md", "README.md")
    for name in (n for n in names[0] if Path(n).name not in of_time):
        a, b = one / name, two / name
        if name.endswith((".pdf", ".png")):
            continue  # drawn from what is compared here; a PDF holds its date
        if name.endswith(".parquet"):
            pd.testing.assert_frame_equal(pd.read_parquet(a), pd.read_parquet(b))
        elif name == "metrics.jsonl":
            timed = {"seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
            rows = [[{k: v for k, v in row.items() if k not in timed} for row in jsonl(x)] for x in (a, b)]
            assert rows[0] == rows[1]
        elif name.endswith((".bin", ".pt", ".pth", ".pkl")):
            assert equal(*(torch.load(x, weights_only=False) for x in (a, b))), name
        elif name.endswith(".safetensors"):
            assert tiny.same(load_file(a), load_file(b)), name
        else:
            assert a.read_bytes().replace(b"unbroken", b"broken") == b.read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_at_random_moments_ends_bit_for_bit_as_one_that_was_not(config, name):
    """Each process is killed at a moment of the time that a whole run takes, until one has come to its end."""
    words, began = RUNS[name], time.monotonic()
    process(config, *words, "name=unbroken").join()
    whole = time.monotonic() - began
    print(f"{name}: a whole run takes {whole:.1f} s")
    chance, kills = random.Random(name), 0
    while True:
        child = process(config, *words, "name=broken")
        child.join(chance.uniform(0.05, 0.5) * whole if kills < 5 else None)
        if child.exitcode is not None:
            assert child.exitcode == 0
            if kills == 5:
                break
            # done before its kill: the next one begins anew
            (Path(config).parent / "runs" / "broken").rename(Path(config).parent / "runs" / f"{name}-{time.time()}")
            continue
        child.kill()
        child.join()
        kills += 1
    runs = Path(config).parent / "runs"
    for stage in words[0].removeprefix("stages=[").removesuffix("]").split(", "):
        same_folder(runs / "unbroken" / stage, runs / "broken" / stage)
    for folder in ("unbroken", "broken"):
        (runs / folder).rename(runs / f"{name}-{folder}")


# -- signals -----------------------------------------------------------------------------------------------------------

LONG = {"sft": 60, "policy": 40, "prefer": 80, "distil": 80}  # steps, more than are over before a signal is sent


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "number"), zip(LONG, [signal.SIGTERM, signal.SIGUSR1] * 2, strict=True))
def test_a_schedulers_signal_ends_the_step_saves_and_exits_with_a_code_of_its_own(config, tmp_path, stage, number):
    objective = stage if stage in ("prefer", "distil") else "match"
    words = (
        f"stages=[{stage}]", f"objective={objective}", f"{stage}.max_steps={LONG[stage]}", f"output_dir={tmp_path}",
        "target={name: tilted, reward: praise, beta: 0.5}", "report_to=none", "sft.training_args.logging_steps=1",
        *([] if stage == "sft" else [f"{stage}.save_steps=1000"]),
    )  # fmt: skip
    process(config, *words, "name=whole").join()
    child = process(config, *words, "name=stopped")
    out = tmp_path / "stopped" / stage
    while not (out / "metrics.jsonl").is_file() or len(jsonl(out / "metrics.jsonl")) < 3:
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == STOPPED_EXIT_CODE
    (saved,) = checkpoints(out)
    assert 3 <= step_of(saved) < LONG[stage]
    assert not (out / "finished.json").is_file()
    again = process(config, *words, "name=stopped")
    again.join()
    assert again.exitcode == 0
    same_models = [load_file(tmp_path / name / stage / "model" / "model.safetensors") for name in ("whole", "stopped")]
    assert tiny.same(*same_models)


def test_a_signal_where_there_are_no_steps_ends_the_stage_at_once(config, monkeypatch):
    """Nothing is lost: what such a stage makes it makes anew, and those before it are finished."""
    monkeypatch.setattr("rlhf_fdiv.stages.evaluate.main", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        run(config, "stages=[evaluate]", "name=at-once")
    assert stopped.value.code == STOPPED_EXIT_CODE
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_after_the_last_step_is_not_lost_on_the_next_stage(config, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr("rlhf_fdiv.stages.sft.main", lambda *args: os.kill(os.getpid(), signal.SIGUSR1))
    monkeypatch.setattr("rlhf_fdiv.stages.evaluate.main", lambda *args: ran.append("evaluate"))
    words = ("stages=[sft, evaluate]", "name=late", f"output_dir={tmp_path}")
    with pytest.raises(SystemExit) as stopped:
        run(config, *words)
    assert stopped.value.code == STOPPED_EXIT_CODE
    assert not ran
    assert (tmp_path / "late" / "sft" / "finished.json").is_file()
    run(config, *words)
    assert ran == ["evaluate"]


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(config, tmp_path):
    """The policy stage of a run that was stopped after step 3, with checkpoints of steps 1, 2 and 3; and how to go on."""
    words = (
        "stages=[policy]", "policy.save_steps=1", "policy.save_total_limit=3", "report_to=none", f"output_dir={tmp_path}",
        "target={name: tilted, reward: praise, beta: 0.5}",
    )  # fmt: skip
    folder = run(config, *words, "policy.max_steps=3", "name=stopped").stage("policy")
    (folder / "finished.json").unlink()
    resolved = folder.parent / "resolved_config.yaml"
    resolved.write_text(resolved.read_text().replace("max_steps: 3", "max_steps: 4"))
    return folder, lambda: run(config, *words, "policy.max_steps=4", "name=stopped").stage("policy")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "file"),
    [
        (cut, "model.safetensors"), (flip, "model.safetensors"), (Path.unlink, "model.safetensors"), (flip, "optimizer.bin"),
        (cut, "random_states_0.pkl"), (cut, "policy_state.json"), (Path.unlink, "policy_state.json"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(stopped, harm, file, capsys):
    folder, go_on = stopped
    harm(folder / "checkpoint-3" / file)
    go_on()
    said = capsys.readouterr().out
    if (harm, file) != (Path.unlink, "policy_state.json"):  # without it the checkpoint was never whole
        assert "checkpoint-3 is damaged (" in said
        assert file in said or file == "policy_state.json"
        assert (folder / "damaged-checkpoint-3" / "policy_state.json").is_file()
    assert f"resumed from {folder / 'checkpoint-2'}" in said
    assert [row["step"] for row in jsonl(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    require_whole(folder / "checkpoint-3")


@pytest.mark.slow
def test_with_no_checkpoint_that_can_be_read_the_run_stops_and_says_what_is_kept(stopped):
    folder, go_on = stopped
    for n in (1, 2, 3):
        flip(folder / f"checkpoint-{n}" / "model.safetensors")
    (message,) = problems(go_on)
    assert "none of its checkpoints can be read" in message
    assert "damaged-checkpoint-3, damaged-checkpoint-2, damaged-checkpoint-1" in message
    assert len(completions(go_on())) == 4 * 16, "asked once more, it starts anew"


# -- other faults ------------------------------------------------------------------------------------------------------

TILTED = "target={name: tilted, reward: praise, beta: 0.5}"


def with_little_room(limit, *args):
    """What a full disk does to a process: no file can grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        tiny.run(*args)
    except UserError as error:
        Path(args[-1].removeprefix("output_dir="), "said").write_text("\n".join(error.problems))


@pytest.mark.slow
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before_it_and_the_run_goes_on_once_there_is_some(
    config, tmp_path
):
    words = ("stages=[policy]", TILTED, "report_to=none", "model.lora=null", "policy.save_steps=1", "name=full")
    run(config, *words, "policy.max_steps=2", f"output_dir={tmp_path}")
    folder = tmp_path / "full" / "policy"
    (folder / "finished.json").unlink()
    (tmp_path / "full" / "resolved_config.yaml").unlink()
    words = (*words, "policy.max_steps=4", f"output_dir={tmp_path}")
    child = PROCESSES.Process(target=with_little_room, args=(50_000, config, *words))
    child.start()
    child.join()
    said = (tmp_path / "said").read_text()
    assert "step 3: the checkpoint cannot be written: " in said
    assert f"{folder / 'checkpoint-2'} is intact, and the same command goes on from it" in said
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    assert [row["step"] for row in jsonl(run(config, *words).stage("policy") / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_data_that_changed_since_a_stage_began_is_named_before_it_goes_on(config, tmp_path, data):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(Path(data["prompts_train"]).read_text())
    words = (
        "stages=[policy]", TILTED, "report_to=none", "policy.save_steps=1", f"output_dir={tmp_path}",
        f"data.prompts_train={prompts}", "name=changed", "policy.max_steps=2",
    )  # fmt: skip
    folder = run(config, *words).stage("policy")
    (folder / "finished.json").unlink()
    prompts.write_text(prompts.read_text().replace("film", "plot", 1))
    (message,) = problems(run, config, *words)
    assert f"data.prompts_train ({prompts}) changed since this stage began" in message
    assert "resume=policy" in message
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    again = run(config, *words, "resume=policy").stage("policy")
    assert len(jsonl(again / "metrics.jsonl")) == 2
    assert (folder.with_name("policy.before-1") / "checkpoint-2").is_dir()


def test_an_update_without_enough_memory_says_which_keys_need_less(config, tmp_path, monkeypatch):
    forward, calls = Policy.forward, []

    def hungry(self, sequences):
        calls.append(torch.is_grad_enabled())
        if sum(calls) > 1:
            torch.empty(2**50, dtype=torch.uint8)  # a petabyte: the allocator's own error
        return forward(self, sequences)

    monkeypatch.setattr(Policy, "forward", hungry)
    (message,) = problems(run, config, "stages=[policy]", TILTED, "report_to=none", f"output_dir={tmp_path}")
    assert "step 1: out of memory in the update" in message
    assert "per_device_train_batch_size (now 8)" in message


def sleepy(prompts, completions, **columns):
    asked.append(len(completions))
    if len(asked) == 2:
        time.sleep(1000)
    return [0.0] * len(completions)


asked: list[int] = []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reward_that_never_answers_ends_the_run_with_its_batch_and_the_last_checkpoint(config, tmp_path, workers):
    asked.clear()
    path = {"name": "function", "path": f"{__name__}:sleepy", "timeout": 0.5, "num_workers": workers}
    words = ("stages=[policy]", TILTED, "report_to=none", "policy.save_steps=1", f"output_dir={tmp_path}")
    first, kept = problems(run, config, f"scorers.praise={json.dumps(path)}", *words)
    assert "scorer 'praise' raised TimeoutError: no answer within 0.5 s" in first
    assert "bad_batch-" in kept
    assert len(pd.read_parquet(next(tmp_path.rglob("bad_batch-*.parquet")))) == 16


def without_roots_rights(said, locked, *args):
    """What anyone but root meets in a read-only folder: permission bits that bind."""
    libc, header, rights = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, rights)
    rights[0] &= ~(1 << 1)  # CAP_DAC_OVERRIDE
    libc.capset(header, rights)
    try:
        os.environ["LOCKED"] = locked
        tiny.run(*args)
    except UserError as error:
        Path(said).write_text("\n".join(error.problems))


def locks(prompts, completions, **columns):
    """Makes the stage's folder read-only while the second step is under way."""
    asked.append(len(completions))
    if len(asked) == 2:
        Path(os.environ["LOCKED"]).chmod(0o555)
    return [0.0] * len(completions)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "in the second step"])
def test_a_folder_that_is_read_only_is_named_with_what_is_kept_and_the_run_goes_on_once_it_is_not(
    config, tmp_path, monkeypatch, when
):
    out = tmp_path / "runs" / "locked" / "policy"
    locked = tmp_path / "runs" if when == "before" else out
    monkeypatch.setenv("LOCKED", str(locked))
    words = ["stages=[policy]", TILTED, "report_to=none", "policy.save_steps=1", "name=locked", "policy.max_steps=2"]
    words += [f"output_dir={tmp_path / 'runs'}"]
    scorer = f"scorers.praise={{name: function, path: '{__name__}:locks'}}"
    if when == "before":
        locked.mkdir(mode=0o555)
        scorer = "scorers.praise={name: length}"
    args = (str(tmp_path / "said"), str(locked), config, *words, scorer)
    child = PROCESSES.Process(target=without_roots_rights, args=args)
    child.start()
    child.join()
    (said,) = (tmp_path / "said").read_text().splitlines()
    assert "Permission denied" in said
    if when == "before":
        assert said.startswith(f"{out.parent}: the run's folder cannot be used: ")
        assert not list(locked.iterdir())
    else:
        assert "step 2: the checkpoint cannot be written: " in said
        assert f"{out / 'checkpoint-1'} is intact, and the same command goes on from it" in said
        require_whole(out / "checkpoint-1")
    locked.chmod(0o755)
    asked[:] = [0, 0]
    run(config, *words, scorer)
    assert [row["step"] for row in jsonl(out / "metrics.jsonl")] == [1, 2]
    assert [p.name for p in checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]


class RewardServer(http.server.BaseHTTPRequestHandler):
    """Answers the first request, and no other until it is `mended`."""

    fault, mended, requests = "", False, 0

    def do_POST(self):
        server = type(self)
        server.requests += 1
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if server.requests > 1 and not server.mended:
            if server.fault == "hangs":
                time.sleep(3)
            return  # without an answer the connection is closed
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps([float(len(text)) for text in texts]).encode())

    def log_message(self, *args):
        pass


def by_http(prompts, completions, **columns):
    request = urllib.request.Request(os.environ["REWARD_SERVER"], json.dumps(completions).encode())
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"), [("dies", "RemoteDisconnected"), ("hangs", "TimeoutError: no answer within 0.5 s")]
)
def test_a_reward_server_that_dies_or_hangs_leaves_its_batch_and_checkpoint_and_the_run_goes_on_once_it_is_back(
    config, tmp_path, monkeypatch, fault, said
):
    handler = type("Handler", (RewardServer,), {"fault": fault})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("REWARD_SERVER", f"http://127.0.0.1:{server.server_port}")
        path = {"name": "function", "path": f"{__name__}:by_http", "timeout": 0.5 if fault == "hangs" else None}
        words = [
            "stages=[policy]",
            TILTED,
            "report_to=none",
            "policy.save_steps=1",
            "policy.max_steps=3",
            "name=served",
        ]
        words += [f"scorers.praise={json.dumps(path)}", f"output_dir={tmp_path}"]
        first, kept = problems(run, config, *words)
        assert first.startswith(f"scorer 'praise' raised {said}")
        out = tmp_path / "served" / "policy"
        assert f"The batch is in {out / 'bad_batch-2.parquet'}" in kept
        assert f"{out / 'checkpoint-1'} is intact, and the same command goes on from it" in kept
        assert len(pd.read_parquet(out / "bad_batch-2.parquet")) == 16
        handler.mended = True
        run(config, *words)
        server.shutdown()
    assert [row["step"] for row in jsonl(out / "metrics.jsonl")] == [1, 2, 3]


DYING = """
import os
from rlhf_fdiv.stages import policy_log
from rlhf_fdiv.stages.common import run_stage
logged = policy_log.Log.step

def step(self, now, *args):
    if now == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    return logged(self, now, *args)

policy_log.Log.step = step
run_stage("policy")
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_where_one_process_dies_the_others_end_too_and_the_last_checkpoint_is_whole(config, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    words = (TILTED, "report_to=none", "policy.save_steps=1", f"output_dir={tmp_path}", "name=dying")
    began = time.monotonic()
    said = tiny.two_processes(str(tmp_path / "dying.py"), config, *words)
    assert "hung" not in said
    assert time.monotonic() - began < 120
    assert "exitcode: -9" in said.replace(" :", ":") or "SIGKILL" in said, said
    assert [p.name for p in checkpoints(tmp_path / "dying" / "policy")] == ["checkpoint-1"]
    require_whole(tmp_path / "dying" / "policy" / "checkpoint-1")
