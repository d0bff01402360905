"""Samples become profiles, each once, whoever dies meanwhile. The profiler is a fake here and LangKit's process in
the integration tests; both are held to ProfilerSuite."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import psutil
import pytest
import uvloop
from prometheus_client import CollectorRegistry

import testkit
from chassis.errors import Code, PlatformError
from monitor.api.grpc import MonitorServicer, pb
from monitor.backends.langkit_process import LangkitProcess
from monitor.backends.prometheus_counters import PrometheusCounters
from monitor.backends.sqlite_profiles import SqliteProfiles
from monitor.core.profiles import Profiled, Profiler, ProfilerDied, ProfilerUnavailable
from monitor.core.profiling import Profiling
from monitor.core.samples import Sample

WORDS = "lexicon_count"


class FakeProfiler:
    """Counts words. Dies over the word "deadly"; cannot profile "odd"."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.num_stops = 0
        self.dies_next = False
        self.is_broken = False

    async def profile(self, binary: bytes | None, texts: Sequence[tuple[str, str]]) -> Profiled:
        if self.is_broken:
            raise ProfilerUnavailable("no encoder")
        self.batches.append([prompt for prompt, _ in texts])
        if self.dies_next or any("deadly" in prompt for prompt, _ in texts):
            self.dies_next = False
            raise ProfilerDied("killed")
        words: dict[str, list[int]] = json.loads(binary) if binary else {}
        failed = tuple(i for i, (prompt, _) in enumerate(texts) if prompt == "odd")
        for i, pair in enumerate(texts):
            for column, text in zip(("prompt", "response"), pair, strict=True):
                if text and i not in failed:
                    words.setdefault(f"{column}.{WORDS}", []).append(len(text.split()))
        statistics = {name: {"count": len(found), "mean": sum(found) / len(found)} for name, found in words.items()}
        return Profiled(json.dumps(words).encode(), statistics, failed)

    async def stop(self) -> None:
        self.num_stops += 1


class ProfilerSuite:
    """How a profiler behaves. A subclass gives `profiler` and `die_over_a_batch`."""

    async def die_over_a_batch(self, profiler: Profiler) -> None:
        """Has the profiler die while it has a batch in hand."""
        raise NotImplementedError

    async def test_prompt_and_response_are_told_apart_and_batches_add_up(self, profiler: Profiler) -> None:
        first = await profiler.profile(None, [("one two three", "one"), ("one", "")])
        assert first.statistics[f"prompt.{WORDS}"]["count"] == 2
        assert first.statistics[f"prompt.{WORDS}"]["mean"] == pytest.approx(2)
        assert first.statistics[f"response.{WORDS}"]["count"] == 1
        second = await profiler.profile(first.binary, [("", "one two three four five")])
        assert second.statistics[f"prompt.{WORDS}"] == first.statistics[f"prompt.{WORDS}"]
        assert second.statistics[f"response.{WORDS}"]["mean"] == pytest.approx(3)
        assert not any(name.startswith("prompt.") for name in (await profiler.profile(None, [("", "x")])).statistics)

    async def test_a_profiler_that_died_or_was_stopped_works_again(self, profiler: Profiler) -> None:
        await profiler.stop()
        first = await profiler.profile(None, [("one", "")])
        with pytest.raises(ProfilerDied):
            await self.die_over_a_batch(profiler)
        second = await profiler.profile(first.binary, [("one two three", "")])
        assert second.statistics[f"prompt.{WORDS}"]["mean"] == pytest.approx(2)
        await profiler.stop()
        await profiler.stop()


class TestFakeProfiler(ProfilerSuite):
    @pytest.fixture
    def profiler(self) -> FakeProfiler:
        return FakeProfiler()

    async def die_over_a_batch(self, profiler: Profiler) -> None:
        assert isinstance(profiler, FakeProfiler)
        profiler.dies_next = True
        await profiler.profile(None, [("x", "")])


@pytest.mark.integration
@pytest.mark.timeout(600)  # low priority waits for the cores
class TestLangkitProcess(ProfilerSuite):
    @pytest.fixture
    async def profiler(self, model_store: Path) -> AsyncIterator[LangkitProcess]:
        profiler = LangkitProcess(worker_options(model_store, cpu_limit_s=60.0))
        yield profiler
        await profiler.stop()

    async def die_over_a_batch(self, profiler: Profiler) -> None:
        assert isinstance(profiler, LangkitProcess) and profiler.pid is not None
        os.kill(profiler.pid, signal.SIGSTOP)
        batch = asyncio.create_task(profiler.profile(None, [("x", "")]))
        await asyncio.sleep(0)
        os.kill(profiler.pid, signal.SIGKILL)
        await batch

    async def test_a_text_that_takes_too_much_of_the_processor_ends_the_process(self, model_store: Path) -> None:
        profiler = LangkitProcess(worker_options(model_store, cpu_limit_s=0.02))
        with pytest.raises(ProfilerDied, match=str(-signal.SIGPROF)):
            await profiler.profile(None, [("one and two. " * 1_000, "")])
        assert profiler.pid is None


def worker_options(model_store: Path, cpu_limit_s: float) -> dict[str, object]:
    encoder_dir = str(model_store / "all-minilm-l6-v2")
    return {"encoder_dir": encoder_dir, "cpu_limit_s": cpu_limit_s, "log_level": "INFO", "log_format": "json"}


async def test_a_profiler_that_cannot_start_says_why_and_blames_no_batch(tmp_path: Path) -> None:
    with pytest.raises(ProfilerUnavailable, match="cannot be started"):
        await LangkitProcess({}, [str(tmp_path / "absent")]).profile(None, [("x", "")])
    with pytest.raises(ProfilerUnavailable, match="ended with"):
        await LangkitProcess({}, ["false"]).profile(None, [("x", "")])


# Answers the options and one batch, then ends.
_ONE_BATCH = """
import json, os, struct, sys
for answer in ({}, {"binary": "", "statistics": {}, "failed": []}):
    (size,) = struct.unpack("!I", sys.stdin.buffer.read(4))
    sys.stdin.buffer.read(size)
    body = json.dumps(answer).encode()
    os.write(1, struct.pack("!I", len(body)) + body)
"""


def test_a_profiler_that_ended_between_two_batches_is_followed_by_a_new_one() -> None:
    async def scenario() -> None:
        profiler = LangkitProcess({}, [sys.executable, "-c", _ONE_BATCH])
        for _ in range(3):
            assert await profiler.profile(None, [("x", "")]) == Profiled(binary=b"", statistics={}, failed=())
            await testkit.eventually(lambda: profiler.pid is None or not psutil.pid_exists(profiler.pid), timeout_s=30)
        await profiler.stop()

    # The service's own loop: of a closed pipe it tells by an error that asyncio's loop does not know.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


class Monitor:
    """The profiling over a real file, with a fake profiler and a clock of its own."""

    def __init__(self, path: Path, *, max_waiting: int = 100, idle_s: float = 60.0) -> None:
        self.path, self._max_waiting, self._idle_s = path, max_waiting, idle_s
        self.profiler = FakeProfiler()
        self.registry = CollectorRegistry()
        self.now = 1_000.0

    async def open_again(self) -> None:
        """A new process over the file that another has left."""
        self.registry = CollectorRegistry()
        await self.open()

    async def open(self) -> None:
        self.store = await SqliteProfiles.open(self.path, max_waiting=self._max_waiting)
        gauges = PrometheusCounters(self.registry)
        self.profiling = Profiling(
            self.store, self.store, self.profiler, gauges, kept_s=600, idle_s=self._idle_s, unix_time=lambda: self.now
        )
        gauges.watch(0.5, lambda: self.profiling.num_waiting, lambda: self.profiling.lag_s)

    async def admit(self, message_id: str, prompt: str = "one two", *, ended: float = 990.0, model: str = "m") -> None:
        await self.profiling.admit(Sample(message_id, model, int(ended // 60) * 60, 60, ended, prompt, "one"))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.profiling.run())
        try:
            yield
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.wait({task}, timeout=10)

    async def work_off(self) -> None:
        async with self.running():
            await testkit.eventually(lambda: self.profiling.num_waiting == 0)

    async def num_profiled(self) -> int:
        return sum(profile.num_records for profile in await self.store.newest(None, 100))

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"pressroom_monitor_{name}", labels) or 0.0


@pytest.fixture
async def monitor(tmp_path: Path) -> AsyncIterator[Monitor]:
    monitor = Monitor(tmp_path / "new" / "profiles.db")
    await monitor.open()
    yield monitor
    await monitor.store.close()


async def test_windows_and_models_have_profiles_of_their_own_newest_first(monitor: Monitor) -> None:
    for i, (ended, model) in enumerate([(950.0, "a"), (955.0, "a"), (961.0, "b"), (1_000.0, "a")]):
        await monitor.admit(f"m{i}", ended=ended, model=model)
    await monitor.work_off()
    found = await monitor.store.newest(None, 10)
    assert [(p.model, p.window_start_unix_s, p.num_records) for p in found] == [
        ("a", 960, 1),
        ("b", 960, 1),
        ("a", 900, 2),
    ]
    assert json.loads(found[2].statistics_json)[f"prompt.{WORDS}"] == {"count": 2, "mean": 2.0}
    assert [p.window_start_unix_s for p in await monitor.store.newest("a", 1)] == [960]
    assert monitor.value("samples_total", outcome="profiled") == 4
    assert monitor.value("column_mean", model="a", column=f"prompt.{WORDS}") == 2
    assert monitor.profiler.batches[0] == ["one two", "one two"], "what belongs together is profiled together"


async def test_what_was_admitted_survives_a_process_that_was_killed_and_is_profiled_once(monitor: Monitor) -> None:
    await monitor.admit("before")
    killed = monitor.store  # never closed, as by kill -9
    await monitor.open_again()
    await monitor.admit("before")  # its ack was lost: it comes again
    await monitor.admit("after")
    await monitor.work_off()
    await monitor.open_again()
    await monitor.admit("before")
    await monitor.work_off()
    assert await monitor.num_profiled() == 2
    await killed.close()


async def test_what_comes_when_too_many_wait_is_left_out_and_counted(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "profiles.db", max_waiting=2)
    await monitor.open()
    for i in range(5):
        await monitor.admit(f"m{i}", ended=970.0 + i)
    assert (monitor.profiling.num_waiting, monitor.profiling.num_dropped, monitor.profiling.lag_s) == (2, 3, 30.0)
    assert (monitor.value("waiting_samples"), monitor.value("lag_seconds")) == (2, 30)
    answer = await MonitorServicer(monitor.store.newest, monitor.profiling, 0.5).GetProfiles(
        pb.GetProfilesRequest(),
        None,  # type: ignore[arg-type]
    )
    assert (answer.sample_rate, answer.num_waiting, answer.lag_s, answer.num_dropped) == (0.5, 2, 30.0, 3)
    await monitor.work_off()
    await monitor.admit("m4")  # was left out; a repeated delivery changes nothing
    assert monitor.profiling.num_waiting == 0 and monitor.profiling.lag_s == 0
    assert await monitor.num_profiled() == monitor.value("samples_total", outcome="profiled") == 2
    assert monitor.value("samples_total", outcome="dropped") == 3
    await monitor.store.close()


async def test_a_sample_that_the_profiler_dies_over_twice_is_skipped_and_its_neighbours_are_profiled(
    monitor: Monitor,
) -> None:
    for i, prompt in enumerate(["one", "deadly", "one", "odd"]):
        await monitor.admit(f"m{i}", prompt)
    await monitor.work_off()
    assert await monitor.num_profiled() == 2
    assert monitor.value("samples_total", outcome="skipped") == 2
    assert sum("deadly" in batch for batch in monitor.profiler.batches) == 2
    assert ["deadly"] in monitor.profiler.batches, "the second time it was alone"


async def test_a_profiler_that_cannot_start_holds_samples_up_and_loses_none(
    monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitor.core.profiling._FIRST_RETRY_S", 0.01)
    monitor.profiler.is_broken = True
    await monitor.admit("a")
    async with monitor.running():
        await asyncio.sleep(0.1)
        assert monitor.profiling.num_waiting == 1
        monitor.profiler.is_broken = False
        await testkit.eventually(lambda: monitor.profiling.num_waiting == 0)
    assert await monitor.num_profiled() == 1


async def test_windows_that_are_too_old_are_forgotten_and_late_records_of_theirs_left_out(monitor: Monitor) -> None:
    await monitor.admit("a", ended=970.0)
    await monitor.work_off()
    monitor.now = 1_700.0
    await monitor.admit("late", ended=970.0)
    assert monitor.value("samples_total", outcome="expired") == 1
    await monitor.admit("b", ended=1_690.0)
    monitor.profiling._next_prune_s = 0.0
    await monitor.work_off()
    assert [p.window_start_unix_s for p in await monitor.store.newest(None, 10)] == [1_680]
    assert await monitor.store.prune(0, 0) == 1, "the number of profiles is bounded too"


async def test_a_text_is_gone_from_the_disk_once_it_is_profiled(monitor: Monitor) -> None:
    def on_disk() -> bool:
        return any(b"Rumpelstiltskin" in path.read_bytes() for path in monitor.path.parent.iterdir())

    await monitor.admit("a", "Rumpelstiltskin " * 300)
    assert on_disk()
    await monitor.work_off()
    await monitor.store.prune(0, 100)
    assert not on_disk()


async def test_the_profiler_is_stopped_when_nothing_comes_and_works_when_something_does(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "profiles.db", idle_s=0.05)
    await monitor.open()
    await monitor.admit("a")
    async with monitor.running():
        await testkit.eventually(lambda: monitor.profiler.num_stops > 0)
        await monitor.admit("b")
        await testkit.eventually(lambda: monitor.profiling.num_waiting == 0)
    assert await monitor.num_profiled() == 2
    await monitor.store.close()


async def test_a_disk_that_takes_nothing_is_an_error_that_may_pass(monitor: Monitor) -> None:
    monitor.store._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(PlatformError, match="cannot be read or written") as caught:
        await monitor.admit("a")
    assert caught.value.code is Code.UNAVAILABLE and caught.value.retryable
    monitor.store._connection.execute("PRAGMA query_only = OFF")
    await monitor.admit("a")
    assert monitor.profiling.num_waiting == 1


async def test_a_folder_that_is_no_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PlatformError, match="file"):
        await SqliteProfiles.open(tmp_path / "file" / "profiles.db", max_waiting=1)
