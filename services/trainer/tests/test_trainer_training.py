"""The child that trains, for real, on a tiny base: kill -9, resuming, a full disk, and what it leaves behind."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_base
from safetensors.numpy import load_file

from testkit import eventually
from trainer.backends import run_files
from trainer.backends.child_processes import ChildProcesses, Ended
from trainer.backends.run_folders import DirectoryRun, DirectoryRuns
from trainer.core.runs import TrainOrder

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

AT_ONCE = str(Path(__file__).with_name("child_at_once.py"))
FILE = tiny_base.chats({f"How old is number {i}?": f"It is {i * i} years old." for i in range(11)})
NUM_STEPS = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base.write(tmp_path_factory.mktemp("tiny") / "store")


def make_run(folder: Path, store: Path, data: bytes = FILE, **spec: object) -> DirectoryRun:
    _, run = DirectoryRuns(folder, max_runs=9).begin(TrainOrder("ftjob-1", "acme", "tiny", "file-1", "", "", "", 5))
    told: dict[str, Any] = {
        "store_dir": str(store),
        "model": tiny_base.MODEL,
        "hyperparameters_json": '{"n_epochs": 10, "batch_size": 3}',
        "seed": 5,
        "num_threads": 1,
        "dtype": "fp32",
        "checkpoint_interval_s": 0.1,
        "max_file_bytes": 100_000,
        "max_examples": 100,
        "max_example_tokens": 2048,
    }
    run.write_input(data, told | spec)
    return run


async def run_child(
    run: DirectoryRun, *, kill_at: int = 0, max_file_bytes: int = 0
) -> tuple[Ended, list[Mapping[str, Any]]]:
    """Runs a child, kills it after a step where told so; returns its end and what it said."""
    told: list[Mapping[str, Any]] = []

    async def on_message(message: Mapping[str, Any]) -> None:
        told.append(message)
        if kill_at and message.get("step") == kill_at and message["kind"] == "step":
            for child in _children():
                os.kill(child, 9)

    command = (sys.executable, AT_ONCE, str(max_file_bytes))
    return await ChildProcesses(command).run(run, on_message), told


def _children() -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process().children() if AT_ONCE in child.cmdline()]


def steps_of(run: DirectoryRun) -> list[tuple[int, float, int]]:
    return [(step.step, step.loss, step.num_tokens) for step in run.steps()]


async def test_a_run_killed_twice_is_the_same_run_as_one_that_was_not(tmp_path: Path, store: Path) -> None:
    """Losses and weights are bit for bit the same: one thread, one seed, one processor."""
    whole = make_run(tmp_path / "whole", store)
    end, told = await run_child(whole)
    assert end.status == 0, end.last_words
    assert [m["kind"] for m in told if m["kind"] not in ("step", "checkpoint")] == ["planned", "resumed", "made"]
    assert [step for step, _, _ in steps_of(whole)] == list(range(1, NUM_STEPS + 1))

    check_adapter(whole)
    cut = make_run(tmp_path / "cut", store)
    resumed = []
    for kill_at in (9, 23, 0):
        end, told = await run_child(cut, kill_at=kill_at)
        assert end.status == (-9 if kill_at else 0), end.last_words
        resumed += [message["step"] for message in told if message["kind"] == "resumed"]
    assert resumed[0] == 0 and resumed == sorted(resumed) and resumed[2] > 0, "it went on from checkpoints"
    assert steps_of(cut) == steps_of(whole)
    weights = [load_file(run.path / run_files.ADAPTER / "adapter_model.safetensors") for run in (whole, cut)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def check_adapter(run: DirectoryRun) -> None:
    """peft's format, without a path of this machine; B begins at zero and learns."""
    adapter = run.path / run_files.ADAPTER
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", tiny_base.MODEL)
    assert str(run.path.parent) not in (adapter / "adapter_config.json").read_text()
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2, "A and B of seven layers in two blocks"
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)
    losses = [loss for _, loss, _ in steps_of(run)]
    assert losses[-1] < losses[0]


async def test_examples_of_the_whole_context_are_learned(tmp_path: Path, store: Path) -> None:
    """Beyond 512 tokens a batch is cut up and activations are computed twice; here the limit is the small context's."""
    data = tiny_base.chats({f"{i} " + "long " * 35: "yes " * 10 for i in range(6)})
    run = make_run(tmp_path, store, data, hyperparameters_json='{"n_epochs": 1, "batch_size": 6}')
    end, _ = await run_child(run)
    assert end.status == 0, end.last_words
    ((_, loss, num_tokens),) = steps_of(run)
    assert num_tokens > 6 * 200 and 0 < loss < 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, int, str]]:
    """A file system of 96 KiB, where the tiny run's checkpoint has 119; who may not mount gets a limit of file sizes.

    Yields folder, limit and what is said of it.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        yield folder, 90_000, "a file may not grow any further"
        return
    yield folder, 0, "the disk is full"
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_disk_that_fills_is_said_and_leaves_no_half_files(
    small_disk: tuple[Path, int, str], store: Path
) -> None:
    folder, max_file_bytes, why = small_disk
    run = make_run(folder, store)
    end, told = await run_child(run, max_file_bytes=max_file_bytes)
    assert (end.status, told[-1]) == (3, {"kind": "no_space", "message": why}), end.last_words
    left = {path.name for path in run.path.iterdir()}
    assert not {name for name in left if "checkpoint" in name or "adapter" in name}, left
    run.prune()
    assert {path.name for path in run.path.iterdir()} <= {"run.json", "steps.jsonl"}


@pytest.mark.parametrize(
    ("data", "spec", "why"),
    [
        (FILE + b"{broken\n", {}, "training_file: line 12: it is not valid JSON"),
        (b"", {}, "training_file: it is empty"),
        (tiny_base.chats({"q" * 300: "a"}), {}, "training_file: line 1: the example has"),
        (FILE, {"model": "absent"}, "there is no model 'absent' that can be finetuned"),
        (FILE, {"hyperparameters_json": '{"n_epochs": 99}'}, "a whole number from 1 to 50"),
    ],
)
async def test_what_cannot_be_trained_is_refused_before_torch_is_loaded(
    tmp_path: Path, store: Path, data: bytes, spec: dict[str, object], why: str
) -> None:
    end, told = await run_child(make_run(tmp_path, store, data, **spec))
    assert end.status == 3 and told[-1]["kind"] == "refused" and why in told[-1]["message"]
    assert "torch was loaded: False" in end.last_words


async def test_a_loss_that_is_no_number_ends_the_job(tmp_path: Path, store: Path) -> None:
    weird = tiny_base.write(tmp_path / "weird")
    config_path = weird / tiny_base.MODEL / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(config | {"rms_norm_eps": float("nan")}))
    _seal(weird / tiny_base.MODEL)
    end, told = await run_child(make_run(tmp_path / "runs", weird))
    assert end.status == 3 and "the loss is no longer a number" in told[-1]["message"]


async def test_a_base_with_a_flipped_byte_is_not_trained_on(tmp_path: Path) -> None:
    damaged = tiny_base.write(tmp_path / "store")
    with (damaged / tiny_base.MODEL / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    end, told = await run_child(make_run(tmp_path / "runs", damaged))
    assert end.status == 3 and "checksum mismatch in model.safetensors" in told[-1]["message"]


def _seal(folder: Path) -> None:
    from modelstore.manifest import write_manifest

    (folder / "manifest.json").unlink()
    write_manifest(
        folder, model_id=tiny_base.MODEL, kind="llm", created_unix_s=1, source={}, config={"context_length": 256}
    )


async def test_the_real_child_runs_behind_all_others_and_ends_with_its_trainer(tmp_path: Path, store: Path) -> None:
    import psutil

    run = make_run(tmp_path, store)
    parent = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'trainer.backends.lora.child', sys.argv[1]],"
        " stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", parent, str(run.path), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    child = psutil.Process(int(await process.stdout.readline()))
    await eventually(lambda: os.sched_getscheduler(child.pid) == os.SCHED_IDLE, timeout_s=90)
    assert os.getpgid(child.pid) == os.getpgid(0), "the launcher ends it with the group"
    child.terminate()
    process.kill()
    await process.wait()
    killed_at = time.monotonic()
    await eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, timeout_s=60)
    assert time.monotonic() - killed_at < 60


async def test_a_cancelled_child_is_gone_when_the_cancellation_returns(tmp_path: Path, store: Path) -> None:
    run = make_run(tmp_path, store, hyperparameters_json='{"n_epochs": 50, "batch_size": 1}')
    task = asyncio.create_task(run_child(run))
    await eventually(lambda: len(run.steps()) > 3, timeout_s=120)
    children = _children()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children and _children() == []


def test_the_idle_trainer_loads_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys, trainer.main; print([m for m in ('torch', 'mlflow', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
