"""The monitor as a real process on a real bus, with LangKit: killed at random moments, exact all the same."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pressroom.events.v1 import events_pb2
from pressroom.monitor.v1 import monitor_pb2, monitor_pb2_grpc

import testkit
from chassis import rpc
from chassis.errors import PlatformError
from chassis.nats_bus import NatsBus
from contracts.subjects import EVENTS_REQUEST_COMPLETED, STREAMS
from testkit.processes import ServiceProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]  # low priority waits for the cores

NUM_RECORDS, NUM_EARLY = 60, 50
PATIENCE_S = 300.0


@pytest.fixture
async def bus(nats_url: str) -> AsyncIterator[NatsBus]:
    bus = NatsBus.connect(nats_url, "test", STREAMS)
    await testkit.eventually(lambda: bus.connected)
    yield bus
    await bus.close()


@pytest.fixture
def monitor(nats_url: str, model_store: Path, tmp_path: Path) -> Iterator[ServiceProcess]:
    process = ServiceProcess(
        "monitor",
        {
            "NATS_URL": nats_url,
            "DATA_DIR": tmp_path / "data",
            "ENCODER_DIR": model_store / "all-minilm-l6-v2",
            "WINDOW_S": 86_400,
        },
    )
    process.start()
    yield process
    process.close()


async def profiles(monitor: ServiceProcess) -> monitor_pb2.GetProfilesResponse:
    async with rpc.connect(monitor.address) as channel, rpc.call("monitor.GetProfiles", timeout_s=20) as call:
        stub = monitor_pb2_grpc.MonitorServiceStub(channel)
        answer: monitor_pb2.GetProfilesResponse = await stub.GetProfiles(
            monitor_pb2.GetProfilesRequest(), timeout=call.timeout_s, metadata=call.metadata
        )
        return answer


def record(number: int) -> bytes:
    return events_pb2.RequestCompleted(
        model="m",
        finish_reason="stop",
        http_status=200,
        started_unix_ms=1_000 * 60 * 60 * 24 * 365 * 100,  # a clock that is wrong: it counts as now
        prompt_text=" ".join(["word"] * (1 + number % 7)),
        completion_text="One. " * 40 if number % 2 else "",
    ).SerializeToString()


async def publish(bus: NatsBus, numbers: range) -> None:
    for number in numbers:
        await bus.publish(EVENTS_REQUEST_COMPLETED, record(number), message_id=f"record-{number}")


def children(monitor: ServiceProcess) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(monitor.pid).children()
    return []


async def test_killed_at_random_moments_it_profiles_every_record_once(bus: NatsBus, monitor: ServiceProcess) -> None:
    seed = 20_261_124
    moments = random.Random(seed)
    assert children(monitor) == [], "LangKit is started by the first sample"
    await publish(bus, range(NUM_EARLY))
    # Once while the records come, once while LangKit starts or works: what is on disk must be enough each time.
    for latest_s in (0.3, 6.0):
        await asyncio.sleep(moments.uniform(0.0, latest_s))
        orphans = children(monitor)
        monitor.kill9()
        await testkit.eventually(lambda left=orphans: not any(p.is_running() for p in left), timeout_s=60)
        monitor.start()
    await publish(bus, range(NUM_EARLY, NUM_RECORDS))  # the early ones may all be done by now

    async def all_profiled() -> monitor_pb2.GetProfilesResponse:
        try:
            answer = await profiles(monitor)
        except PlatformError as error:
            if not monitor.running:
                pytest.fail(f"the monitor ended by itself:\n{monitor.log[-4000:]}")
            raise AssertionError(error.message) from error
        assert answer.num_waiting == 0
        assert sum(profile.num_records for profile in answer.profiles) >= NUM_RECORDS
        return answer

    answer = await testkit.eventually(all_profiled, timeout_s=PATIENCE_S, interval_s=0.5)
    assert (answer.sample_rate, answer.lag_s, answer.num_dropped) == (1.0, 0.0, 0)
    check(answer)
    await check_running(monitor)
    monitor.stop()
    monitor.start()
    check(await profiles(monitor))
    assert children(monitor) == [], "old windows are answered without LangKit"


def check(answer: monitor_pb2.GetProfilesResponse) -> None:
    """Exact counts and means, summed over windows: midnight may fall into the test."""
    found: list[dict[str, Any]] = [json.loads(profile.statistics_json) for profile in answer.profiles]
    assert sum(profile.num_records for profile in answer.profiles) == NUM_RECORDS
    total: Callable[[str, str], float] = lambda column, name: sum(one[column][name] for one in found if column in one)  # noqa: E731
    assert total("prompt.lexicon_count", "count") == NUM_RECORDS
    assert total("prompt.lexicon_count", "total") == sum(1 + number % 7 for number in range(NUM_RECORDS))
    assert total("response.lexicon_count", "count") == NUM_RECORDS // 2
    assert total("response.lexicon_count", "total") == 40 * NUM_RECORDS // 2
    assert 0 < found[0]["prompt.attack_similarity"]["max"] < 1


async def check_running(monitor: ServiceProcess) -> None:
    (worker,) = children(monitor)
    assert worker.nice() == 19, "LangKit runs behind everything else"
    assert monitor.metric("pressroom_monitor_samples_total", outcome="skipped") == 0
    assert monitor.metric("pressroom_monitor_waiting_samples") == 0
    assert monitor.metric("pressroom_monitor_sample_rate") == 1
    assert monitor.metric("pressroom_monitor_column_mean", model="m", column="prompt.lexicon_count") > 1
