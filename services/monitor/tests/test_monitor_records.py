"""The monitor counts each finished request once, under few labels."""

from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2
from prometheus_client import CollectorRegistry

import testkit
from chassis.bus import DEAD_PREFIX, Received
from contracts.subjects import EVENTS_REQUEST_COMPLETED
from monitor.api.consumers import DURABLE, RequestRecords
from monitor.backends.prometheus_counters import PrometheusCounters
from monitor.core.samples import Sample, Sampler
from monitor.core.tally import FinishedRequest, Tally
from testkit.bus_suite import consuming
from testkit.fake_bus import FakeBus


def event(model: str = "m", *, http_status: int = 200, finish_reason: str = "stop", prompt: str = "") -> bytes:
    return events_pb2.RequestCompleted(
        request_id="req_1",
        model=model,
        finish_reason=finish_reason,
        http_status=http_status,
        started_unix_ms=1_000_500,
        duration_s=2.0,
        prompt_text=prompt,
        usage=common_pb2.Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=2),
    ).SerializeToString()


class Counted:
    """Metrics of one test's own registry, and the handler that feeds them."""

    def __init__(self, **options: int) -> None:
        self.registry = CollectorRegistry()
        self.samples: list[Sample] = []
        tally = Tally(PrometheusCounters(self.registry), **options)
        self.handle = RequestRecords(tally, Sampler(rate=1.0, window_s=60, max_chars=100), self._admit).handle

    async def _admit(self, sample: Sample) -> None:
        self.samples.append(sample)

    async def hear(self, message_id: str, payload: bytes) -> None:
        await self.handle(Received(EVENTS_REQUEST_COMPLETED, payload, message_id, 1, {}))

    def records(self, model: str, finish_reason: str = "stop") -> float:
        labels = {"model": model, "finish_reason": finish_reason}
        return self.registry.get_sample_value("pressroom_monitor_records_total", labels) or 0.0

    def tokens(self, model: str, kind: str) -> float:
        labels = {"model": model, "kind": kind}
        return self.registry.get_sample_value("pressroom_monitor_tokens_total", labels) or 0.0


async def test_records_and_tokens_are_counted_by_model() -> None:
    counted = Counted()
    await counted.hear("a", event("m"))
    await counted.hear("b", event("m", finish_reason="length"))
    await counted.hear("c", event("n"))
    assert (counted.records("m"), counted.records("m", "length"), counted.records("n")) == (1, 1, 1)
    assert [counted.tokens("m", kind) for kind in ("prompt", "completion", "cached")] == [14, 6, 4]


async def test_a_repeated_delivery_counts_once_and_a_repeated_request_id_twice() -> None:
    counted = Counted()
    for message_id in ("a", "a", "b"):
        await counted.hear(message_id, event())
    assert counted.records("m") == 2


async def test_what_is_remembered_is_bounded() -> None:
    counted = Counted(window=2)
    for message_id in ("a", "b", "c", "c", "a"):
        await counted.hear(message_id, event())
    assert counted.records("m") == 4


async def test_names_that_clients_invent_get_no_label() -> None:
    counted = Counted(max_models=1)
    await counted.hear("a", event("invented", http_status=404))
    await counted.hear("b", event("real"))
    await counted.hear("c", event("real", http_status=500))
    await counted.hear("d", event("one too many"))
    await counted.hear("e", event("real", finish_reason="made up"))
    assert counted.records("invented") == counted.records("one too many") == 0
    assert (counted.records("real"), counted.records("other"), counted.records("real", "other")) == (2, 2, 1)


async def test_records_that_came_while_the_monitor_was_away_are_counted_when_it_is_back() -> None:
    bus, counted = FakeBus(), Counted()
    for i in range(5):
        await bus.publish(EVENTS_REQUEST_COMPLETED, event(), message_id=f"m{i}")
    async with consuming(bus, EVENTS_REQUEST_COMPLETED, counted.handle, durable=DURABLE):
        await testkit.eventually(lambda: counted.records("m") == 5)


async def test_a_record_that_cannot_be_read_is_a_dead_letter_and_the_next_is_counted() -> None:
    bus, counted = FakeBus(), Counted()
    async with consuming(bus, EVENTS_REQUEST_COMPLETED, counted.handle, durable=DURABLE):
        await bus.publish(EVENTS_REQUEST_COMPLETED, b"\xff not protobuf", message_id="bad")
        await bus.publish(EVENTS_REQUEST_COMPLETED, event(), message_id="good")
        await testkit.eventually(lambda: counted.records("m") == 1)
    assert len(bus.stored(DEAD_PREFIX + EVENTS_REQUEST_COMPLETED)) == 1


async def test_a_record_with_text_is_sampled_under_its_label_and_window_and_one_without_is_counted_alone() -> None:
    counted = Counted(max_models=1)
    await counted.hear("a", event("m", prompt="Hello"))
    await counted.hear("b", event("m"))
    await counted.hear("c", event("invented", http_status=404, prompt="Hello"))
    assert [(s.message_id, s.model, s.window_start_unix_s, s.prompt) for s in counted.samples] == [
        ("a", "m", 960, "Hello"),  # it ended at 1002.5
        ("c", "other", 960, "Hello"),
    ]
    assert counted.records("m") == 2


def test_tally_says_whether_a_record_was_new() -> None:
    tally = Tally(PrometheusCounters(CollectorRegistry()))
    request = FinishedRequest("m", "stop", True, 1, 1, 0)
    assert tally.record("a", request) is True
    assert tally.record("a", request) is False
