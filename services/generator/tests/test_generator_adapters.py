"""Adapters from the store to a client: gRPC, bus and start over real folders, on the toy engine."""

import asyncio
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import lora_files
import numpy as np
import pytest
from engine_suite import ask
from pressroom.events.v1 import events_pb2
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc
from prometheus_client import REGISTRY

from chassis import rpc
from chassis.bus import Received
from chassis.errors import Code, PlatformError
from generator.api import consumers
from generator.api.grpc import GeneratorServicer
from generator.backends.adapter_store import FolderAdapterStore
from generator.backends.toy import ByteTokenizer, ToyAdapter, ToyRunner
from generator.core import sampling
from generator.core.adapters import AdapterFiles, AdapterLimits
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.library import AdapterLibrary, AdapterOrder
from generator.core.scheduler import SchedulerLimits
from generator.core.sequences import Sequence
from generator.core.stream import TokenStream
from modelstore.manifest import sha256_of, write_manifest

Stub = generator_pb2_grpc.GeneratorServiceStub
BASE_VERSION = "0" * 12  # the toy's
EARLIER_VERSION = "1" * 12  # of a manifest before its weights were packed as well
BASE_WEIGHTS = "2" * 64
ID = "toy:mine"


class Runner(ToyRunner):
    """Reads adapters behind a gate, counts them, and gives what is called "sick" no finite logits."""

    def __init__(self) -> None:
        super().__init__(2000, 4, 1024)
        self.gate = threading.Event()
        self.gate.set()
        self.num_read = 0
        self._sick: set[int] = set()

    def read_adapter(self, files: AdapterFiles) -> ToyAdapter:
        assert self.gate.wait(10)
        self.num_read += 1
        adapter = super().read_adapter(files)
        if b"sick" in files.tensors:
            self._sick.add(adapter.salt)
        return adapter

    def _logits(self, sequence: Sequence, num_tokens: int) -> sampling.Floats:
        logits = super()._logits(sequence, num_tokens)
        is_sick = isinstance(sequence.adapter, ToyAdapter) and sequence.adapter.salt in self._sick
        return np.full_like(logits, np.nan) if is_sick else logits


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
async def engine(runner: Runner) -> AsyncIterator[BatchingEngine]:
    limits = AdapterLimits(max_adapters=3, max_bytes=100)
    engine = BatchingEngine(runner, ByteTokenizer(), BlockManager(2000, 4), SchedulerLimits(), limits)
    engine.start()
    yield engine
    await engine.close()


@pytest.fixture
def loads() -> Counter[str]:
    return Counter()


@pytest.fixture
def library(engine: BatchingEngine, store: Path, loads: Counter[str]) -> AdapterLibrary:
    adapters = FolderAdapterStore(
        store, "toy", BASE_VERSION, 10_000, base_weights_sha256=BASE_WEIGHTS, earlier_versions=[EARLIER_VERSION]
    )
    return AdapterLibrary(engine, adapters, lambda outcome: loads.update([outcome]))


@pytest.fixture
async def stub(engine: BatchingEngine, library: AdapterLibrary) -> AsyncIterator[Stub]:
    server = rpc.make_server("generator")
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(
        GeneratorServicer(engine, library, ByteTokenizer()), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rpc.connect(f"127.0.0.1:{port}") as channel:
        yield Stub(channel)
    await server.stop(0)


def _publish(
    store: Path, job_id: str, adapter_id: str = ID, content: bytes = b"weights", created: int = 1, **config: str
) -> AdapterOrder:
    files = AdapterFiles(lora_files.spec(adapter_id), b"{}", content)
    version = config.pop("version", BASE_VERSION)
    sha256 = lora_files.publish(store, job_id, files, version, created_unix_s=created, **config)
    return AdapterOrder(adapter_id, f"adapters/{job_id}", sha256)


def _message(order: AdapterOrder) -> pb.LoadAdapterRequest:
    return pb.LoadAdapterRequest(adapter=order.id, path=order.path, manifest_sha256=order.manifest_sha256)


async def _load(stub: Stub, order: AdapterOrder) -> pb.ServedModel:
    async with rpc.call("generator.LoadAdapter", timeout_s=20) as call:
        return (await stub.LoadAdapter(_message(order), timeout=call.timeout_s)).model


async def _unload(stub: Stub, adapter_id: str) -> None:
    async with rpc.call("generator.UnloadAdapter", timeout_s=20) as call:
        await stub.UnloadAdapter(pb.UnloadAdapterRequest(adapter=adapter_id), timeout=call.timeout_s)


async def _generate(stub: Stub, model: str, adapter: str = "") -> tuple[str, str]:
    """Returns the version that answered, and its text."""
    request = pb.GenerateRequest(
        model=model,
        adapter=adapter,
        text="Set the type.",
        sampling=pb.SamplingParams(temperature=0),
        stop=pb.StopParams(max_tokens=20, ignore_eos=True),
    )
    async with rpc.call("generator.Generate", timeout_s=20) as call:
        messages = [message async for message in stub.Generate(request, timeout=call.timeout_s)]
    return messages[0].started.model_version, "".join(message.delta.text for message in messages)


def _num_counted(model: str) -> float | None:
    labels = {"service": "generator", "model": model, "kind": "completion"}
    return REGISTRY.get_sample_value("pressroom_tokens_total", labels)


async def test_an_adapter_is_loaded_listed_asked_and_unloaded(stub: Stub, store: Path, loads: Counter[str]) -> None:
    base = await _generate(stub, "toy")
    order = _publish(store, "ftjob-1", created=77)
    loaded = await _load(stub, order)
    assert (loaded.id, loaded.base, loaded.version) == (ID, "toy", order.manifest_sha256[:12])
    assert (loaded.context_length, loaded.created_unix_s) == (1024, 77) and "lora" not in loaded.capabilities
    assert [m.id for m in (await stub.ListModels(pb.ListModelsRequest())).models] == ["toy", ID]
    assert (await stub.Tokenize(pb.TokenizeRequest(model=ID, text="ink"))).token_ids == list(b"ink")

    version, text = await _generate(stub, "toy", ID)
    assert version == loaded.version and text != base[1]
    assert await _generate(stub, ID) == await _generate(stub, ID, ID) == (version, text)
    assert await _generate(stub, "toy") == base

    assert await _load(stub, order) == loaded and loads == Counter(loaded=1, present=1)
    assert _num_counted(ID) == 3 * 20  # tokens
    await _unload(stub, ID)
    assert _num_counted(ID) is None
    for call in (_generate(stub, "toy", ID), _generate(stub, ID), _unload(stub, ID)):
        with pytest.raises(PlatformError) as raised:
            await call
        assert (raised.value.code, raised.value.reason) == (Code.NOT_FOUND, "model_not_found")
    assert await _generate(stub, "toy") == base


async def test_loads_of_one_adapter_at_once_are_one_load(stub: Stub, store: Path, runner: Runner) -> None:
    order = _publish(store, "ftjob-1")
    runner.gate.clear()
    calls = [asyncio.create_task(_load(stub, order)) for _ in range(4)]
    await _generate(stub, "toy")  # the engine goes on meanwhile
    runner.gate.set()
    assert len({(await call).version for call in calls}) == 1 and runner.num_read == 1


async def test_a_load_whose_caller_left_does_not_hold_back_the_next(stub: Stub, store: Path, runner: Runner) -> None:
    order = _publish(store, "ftjob-1")
    runner.gate.clear()
    first = stub.LoadAdapter(_message(order), timeout=20)
    await asyncio.sleep(0.1)
    first.cancel()
    runner.gate.set()
    assert (await _load(stub, order)).id == ID


async def test_another_version_replaces_the_first(stub: Stub, store: Path) -> None:
    await _load(stub, _publish(store, "ftjob-1"))
    first = await _generate(stub, ID)
    loaded = await _load(stub, _publish(store, "ftjob-2", content=b"other weights"))
    second = await _generate(stub, ID)
    assert second[0] == loaded.version and second != first
    assert [m.id for m in (await stub.ListModels(pb.ListModelsRequest())).models] == ["toy", ID]


async def test_a_failed_probe_leaves_what_was_there(stub: Stub, store: Path, loads: Counter[str]) -> None:
    with pytest.raises(PlatformError) as raised:
        await _load(stub, _publish(store, "ftjob-1", content=b"sick"))
    assert (raised.value.code, raised.value.reason) == (Code.FAILED_PRECONDITION, "adapter_probe_failed")
    assert len((await stub.ListModels(pb.ListModelsRequest())).models) == 1
    await _load(stub, _publish(store, "ftjob-2"))
    before = await _generate(stub, ID)
    with pytest.raises(PlatformError):
        await _load(stub, _publish(store, "ftjob-3", content=b"sick again"))
    assert await _generate(stub, ID) == before and loads == Counter(loaded=1, failed=2)


async def _listed(stub: Stub) -> list[str]:
    return [model.id for model in (await stub.ListModels(pb.ListModelsRequest())).models]


def _in_use(engine: BatchingEngine, adapter_id: str) -> TokenStream:
    """Starts a stream that goes on until it is cancelled or 1000 tokens are out."""
    return engine.submit(ask(most=1000, adapter=adapter_id), lambda _: None)


async def _end(stream: TokenStream) -> None:
    stream.cancel()
    _ = [event async for event in stream]


async def test_the_least_recently_used_adapter_makes_room_and_comes_back_when_it_is_asked(
    stub: Stub, store: Path, engine: BatchingEngine
) -> None:
    orders = [_publish(store, f"ftjob-{i}", f"toy:{i}", content=f"weights {i}".encode()) for i in range(4)]
    texts = {}
    for order in orders[:3]:
        await _load(stub, order)
        texts[order.id] = await _generate(stub, order.id)
    await _generate(stub, "toy:0")  # so toy:1 is the least recently used
    await _load(stub, orders[3])
    assert [spec.id for spec in engine.adapters()] == ["toy:0", "toy:2", "toy:3"]
    assert await _listed(stub) == ["toy", "toy:0", "toy:1", "toy:2", "toy:3"]
    assert await _generate(stub, "toy", "toy:1") == texts["toy:1"]
    assert [spec.id for spec in engine.adapters()] == ["toy:0", "toy:1", "toy:3"]
    stats = await stub.GetStats(pb.GetStatsRequest())
    assert (stats.loaded_adapters, stats.adapter_evictions_total, stats.adapter_bytes) == (3, 2, 3 * len("weights 0"))


async def test_as_many_go_as_the_memory_needs_and_no_more(store: Path, stub: Stub, engine: BatchingEngine) -> None:
    for name, size in (("a", 40), ("b", 30), ("c", 20)):
        await _load(stub, _publish(store, name, f"toy:{name}", content=name.encode() * size))
    await _load(stub, _publish(store, "d", "toy:d", content=b"d" * 70))
    assert [spec.id for spec in engine.adapters()] == ["toy:c", "toy:d"]
    with pytest.raises(PlatformError, match="101 bytes") as raised:
        await _load(stub, _publish(store, "e", "toy:e", content=b"e" * 101))
    assert raised.value.code is Code.INVALID_ARGUMENT
    assert [spec.id for spec in engine.adapters()] == ["toy:c", "toy:d"]


async def test_more_adapters_than_fit_are_served_at_once(stub: Stub, store: Path, library: AdapterLibrary) -> None:
    """Eight adapters where three fit, asked for by 24 requests at a time, beside the base; nothing is refused."""
    for number in range(8):
        _publish(store, f"ftjob-{number}", f"toy:{number}", content=f"weights {number}".encode(), created=number)
    await library.load_all()
    alone = {f"toy:{number}": await _generate(stub, f"toy:{number}") for number in range(8)}
    assert len(set(alone.values())) == 8
    asked = [f"toy:{number % 8}" for number in range(24)]
    base, *answers = await asyncio.gather(_generate(stub, "toy"), *(_generate(stub, name) for name in asked))
    assert answers == [alone[name] for name in asked] and base not in answers


async def test_requests_for_an_adapter_that_is_not_loaded_are_one_load_and_hold_nobody_up(
    stub: Stub, store: Path, library: AdapterLibrary, runner: Runner, loads: Counter[str]
) -> None:
    for number in range(4):
        _publish(store, f"ftjob-{number}", f"toy:{number}", created=9 - number)
    await library.load_all()
    assert (runner.num_read, loads) == (3, Counter(loaded=3, full=1))
    runner.gate.clear()
    waiting = [asyncio.create_task(_generate(stub, "toy:3")) for _ in range(4)]
    await asyncio.gather(_generate(stub, "toy"), _generate(stub, "toy:0"))  # the others go on meanwhile
    assert not any(task.done() for task in waiting)
    runner.gate.set()
    assert len({await task for task in waiting}) == 1 and runner.num_read == 4
    assert loads == Counter(loaded=4, full=1)


async def test_a_load_on_demand_whose_request_left_is_taken_up_by_the_next(
    stub: Stub, store: Path, library: AdapterLibrary, runner: Runner, engine: BatchingEngine, loads: Counter[str]
) -> None:
    for number in range(4):
        _publish(store, f"ftjob-{number}", f"toy:{number}", created=9 - number)
    await library.load_all()
    runner.gate.clear()
    first, second = (asyncio.create_task(_generate(stub, "toy:3")) for _ in range(2))
    await asyncio.sleep(0.1)
    first.cancel()
    runner.gate.set()
    assert (await second)[1] and loads["failed"] == 0
    assert engine.stats().adapter_bytes == 3 * len(b"weights")  # what was dropped holds nothing


async def test_where_all_are_in_use_a_request_waits_and_its_deadline_holds(
    stub: Stub, store: Path, library: AdapterLibrary, engine: BatchingEngine
) -> None:
    for number in range(4):
        _publish(store, f"ftjob-{number}", f"toy:{number}", created=9 - number)
    await library.load_all()
    streams = [_in_use(engine, f"toy:{number}") for number in range(3)]
    with pytest.raises(PlatformError) as raised:
        await library.ensure("toy:3", time.time() + 0.2)
    assert raised.value.code is Code.DEADLINE_EXCEEDED
    waiting = asyncio.create_task(_generate(stub, "toy:3"))
    await _end(streams[1])
    version, _ = await waiting
    assert version == {spec.id: spec.version for spec in engine.adapters()}["toy:3"]
    assert [spec.id for spec in engine.adapters()] == ["toy:0", "toy:2", "toy:3"]
    for stream in streams:
        await _end(stream)


async def test_a_call_to_load_where_all_are_in_use_is_refused_and_the_adapter_is_known(
    stub: Stub, store: Path, library: AdapterLibrary, engine: BatchingEngine
) -> None:
    orders = [_publish(store, f"ftjob-{i}", f"toy:{i}", created=9 - i) for i in range(5)]
    for order in orders[:3]:
        await _load(stub, order)
    streams = [_in_use(engine, f"toy:{number}") for number in range(3)]
    with pytest.raises(PlatformError) as raised:
        await _load(stub, orders[3])
    assert (raised.value.code, raised.value.reason) == (Code.OVERLOADED, "adapters_full") and raised.value.retryable
    await consumers.make_published_handler(library)(_event(orders[4]))  # done: no room now, and no dead letter
    assert await _listed(stub) == ["toy", *(f"toy:{number}" for number in range(5))]
    for stream in streams:
        await _end(stream)
    assert (await _generate(stub, "toy:3"))[1] == (await _generate(stub, "toy:4"))[1]


async def test_a_bad_request_is_refused_before_its_adapter_is_loaded(
    stub: Stub, store: Path, library: AdapterLibrary, runner: Runner
) -> None:
    for number in range(4):
        _publish(store, f"ftjob-{number}", f"toy:{number}", created=9 - number)
    await library.load_all()
    request = pb.GenerateRequest(model="toy:3", text="a", sampling=pb.SamplingParams(temperature=3.0))
    with pytest.raises(PlatformError, match="temperature"):
        async with rpc.call("generator.Generate", timeout_s=20) as call:
            _ = [message async for message in stub.Generate(request, timeout=call.timeout_s)]
    assert runner.num_read == 3


async def test_an_adapter_that_does_not_load_on_demand_says_why_and_is_not_tried_at_once_again(
    stub: Stub, store: Path, library: AdapterLibrary, runner: Runner, loads: Counter[str]
) -> None:
    for number in range(3):
        _publish(store, f"ftjob-{number}", f"toy:{number}", created=9)
    damaged, sick = _publish(store, "d", "toy:damaged"), _publish(store, "s", "toy:sick", content=b"sick")
    gone = _publish(store, "g", "toy:gone")
    await library.load_all()
    (store / damaged.path / "adapter_model.safetensors").write_bytes(b"weighty")
    shutil.rmtree(store / gone.path)
    expected = {damaged.id: Code.DATA_LOSS, sick.id: Code.FAILED_PRECONDITION, gone.id: Code.NOT_FOUND}
    for adapter_id, code in expected.items():
        for _ in range(3):
            with pytest.raises(PlatformError) as raised:
                await _generate(stub, adapter_id)
            assert raised.value.code is code
    assert runner.num_read == 4 and loads["failed"] == 3  # each once
    assert gone.id not in await _listed(stub) and damaged.id in await _listed(stub)
    assert (await _generate(stub, "toy:2"))[1]


async def test_a_load_that_the_engine_had_no_room_for_is_tried_again_at_once(store: Path, loads: Counter[str]) -> None:
    """The queue holds one sequence, so that a probe is refused while another waits."""
    limits = SchedulerLimits(max_running=1, max_waiting=1)
    engine = BatchingEngine(Runner(), ByteTokenizer(), BlockManager(2000, 4), limits)
    engine.start()
    order = _publish(store, "ftjob-1")
    adapters = FolderAdapterStore(store, "toy", BASE_VERSION, max_bytes=10_000)
    library = AdapterLibrary(engine, adapters, lambda outcome: loads.update([outcome]))
    running = engine.submit(ask(most=900), lambda _: None)
    await anext(running)
    waiting = engine.submit(ask(most=900), lambda _: None)
    with pytest.raises(PlatformError, match="queue is full"):
        await library.load(order)
    await _end(running)
    await _end(waiting)
    assert (await library.load(order)).id == ID and loads == Counter(busy=1, loaded=1)
    await engine.close()


async def test_an_unloaded_adapter_is_unknown_until_there_is_news_of_it(
    stub: Stub, store: Path, library: AdapterLibrary
) -> None:
    orders = [_publish(store, f"ftjob-{i}", f"toy:{i}", created=9 - i) for i in range(4)]
    await library.load_all()
    for adapter_id in ("toy:0", "toy:3"):  # loaded, and known only
        await _unload(stub, adapter_id)
        for call in (_generate(stub, adapter_id), _unload(stub, adapter_id)):
            with pytest.raises(PlatformError) as raised:
                await call
            assert raised.value.code is Code.NOT_FOUND
    assert await _listed(stub) == ["toy", "toy:1", "toy:2"]
    await consumers.make_published_handler(library)(_event(orders[3]))
    assert (await _generate(stub, "toy:3"))[0] == orders[3].manifest_sha256[:12]


async def test_without_room_for_a_single_adapter_none_is_waited_for(store: Path, runner: Runner) -> None:
    engine = BatchingEngine(runner, ByteTokenizer(), BlockManager(2000, 4), SchedulerLimits(), AdapterLimits(0, 100))
    engine.start()
    _publish(store, "ftjob-1")
    library = AdapterLibrary(engine, FolderAdapterStore(store, "toy", BASE_VERSION, max_bytes=10_000))
    await library.load_all()
    with pytest.raises(PlatformError) as raised:
        await library.ensure(ID)
    assert (raised.value.reason, raised.value.retryable) == ("adapters_full", False)
    await engine.close()


async def test_weights_that_were_replaced_count_while_a_request_uses_them(engine: BatchingEngine) -> None:
    def files(content: bytes) -> AdapterFiles:
        return AdapterFiles(lora_files.spec(ID, content), b"{}", content)

    await engine.load_adapter(files(b"1" * 40))
    stream = engine.submit(ask(most=1000, adapter=ID), lambda _: None)
    await engine.load_adapter(files(b"2" * 40))
    with pytest.raises(PlatformError, match="80 of 100 are taken"):
        await engine.load_adapter(files(b"3" * 40))
    stream.cancel()
    _ = [event async for event in stream]
    await engine.load_adapter(files(b"3" * 40))


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"manifest_sha256": "f" * 64}, Code.DATA_LOSS, ("f" * 64,)),
        ({"manifest_sha256": ""}, Code.INVALID_ARGUMENT, ("manifest_sha256",)),
        ({"id": "toy:yours"}, Code.INVALID_ARGUMENT, ("toy:yours", ID)),
        ({"path": "adapters/none"}, Code.NOT_FOUND, ("adapters/none",)),
        ({"path": "adapters/../adapters/ftjob-1"}, Code.INVALID_ARGUMENT, ("..",)),
        ({"path": "/etc"}, Code.INVALID_ARGUMENT, ("/etc",)),
        ({"path": "adapters/link"}, Code.INVALID_ARGUMENT, ("adapters/link",)),
        ({"path": "adapters/\0"}, Code.INVALID_ARGUMENT, ("model store",)),
        ({"path": "."}, Code.INVALID_ARGUMENT, ("model store",)),
    ],
)
async def test_an_order_that_is_wrong_is_refused(
    stub: Stub, store: Path, tmp_path: Path, change: dict[str, str], code: Code, words: tuple[str, ...]
) -> None:
    order = _publish(store, "ftjob-1")
    shutil.copytree(store / "adapters" / "ftjob-1", tmp_path / "outside")
    (store / "adapters" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(PlatformError) as raised:
        await _load(stub, replace(order, **change))
    assert raised.value.code is code and all(word in raised.value.message for word in words)


@pytest.mark.parametrize(
    "fields",
    [
        {"version": EARLIER_VERSION},
        {"version": EARLIER_VERSION, "base_weights_sha256": BASE_WEIGHTS},
        {"version": "a" * 12, "base_weights_sha256": BASE_WEIGHTS},
    ],
    ids=["of a version that is listed", "of our weights", "of our weights under a version that nobody knows"],
)
async def test_an_adapter_outlives_a_new_manifest_of_the_same_weights(
    stub: Stub, store: Path, fields: dict[str, str]
) -> None:
    order = _publish(store, "ftjob-1", **fields)
    assert (await _load(stub, order)).id == order.id


async def test_an_adapter_for_other_weights_is_refused_even_under_our_version(stub: Stub, store: Path) -> None:
    with pytest.raises(PlatformError) as raised:
        await _load(stub, _publish(store, "ftjob-1", base_weights_sha256="3" * 64))
    assert raised.value.code is Code.FAILED_PRECONDITION


@pytest.mark.parametrize(
    "fields", [{"base": "llama"}, {"version": "a" * 12}], ids=["another base", "another version of the base"]
)
async def test_an_adapter_for_another_base_is_refused_with_both_names(
    stub: Stub, store: Path, fields: dict[str, str]
) -> None:
    with pytest.raises(PlatformError) as raised:
        await _load(stub, _publish(store, "ftjob-1", **fields))
    assert raised.value.code is Code.FAILED_PRECONDITION
    assert all(name in raised.value.message for name in ("'toy'", BASE_VERSION, *fields.values()))


@pytest.mark.parametrize("adapter_id", ["toy", "toy:", "other:mine", "toy:a b", "toy:a:b", "toy:" + "x" * 200])
async def test_an_id_that_is_none_of_the_bases_is_refused(stub: Stub, store: Path, adapter_id: str) -> None:
    with pytest.raises(PlatformError) as raised:
        await _load(stub, _publish(store, "ftjob-1", adapter_id, base="toy"))
    assert (raised.value.code, raised.value.param) == (Code.INVALID_ARGUMENT, "adapter")


async def test_files_that_are_not_what_the_manifest_says_are_refused(stub: Stub, store: Path) -> None:
    def spoil_byte(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"Weights")

    def cut(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"weigh")

    def remove(folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()

    def link_out(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        os.replace(path, store / "elsewhere")
        path.symlink_to(store / "elsewhere")

    for number, spoil in enumerate((spoil_byte, cut, remove, link_out)):
        order = _publish(store, f"ftjob-{number}")
        spoil(store / order.path)
        with pytest.raises(PlatformError) as raised:
            await _load(stub, order)
        assert raised.value.code is Code.DATA_LOSS and "adapter_model.safetensors" in raised.value.message


async def test_what_is_no_adapter_or_too_large_is_refused(stub: Stub, store: Path) -> None:
    with pytest.raises(PlatformError, match="allowed"):
        await _load(stub, _publish(store, "ftjob-1", content=b"x" * 20_000))
    order = _publish(store, "ftjob-2")
    folder = store / order.path
    (folder / "manifest.json").unlink()
    write_manifest(folder, model_id=ID, kind="llm", created_unix_s=1, source={}, config={})
    with pytest.raises(PlatformError, match="no adapter"):
        await _load(stub, replace(order, manifest_sha256=sha256_of(folder / "manifest.json")))


# The bus.


def _event(order: AdapterOrder) -> Received:
    message = events_pb2.ModelPublished(id=order.id, base="toy", path=order.path, manifest_sha256=order.manifest_sha256)
    return Received("s", message.SerializeToString(), "m", 1, {})


async def test_a_published_adapter_answers_once_its_event_is_handled(
    stub: Stub, store: Path, library: AdapterLibrary
) -> None:
    publish = consumers.make_published_handler(library)
    order = _publish(store, "ftjob-1")
    await publish(_event(order))
    await publish(_event(order))  # at least once
    assert (await _generate(stub, ID))[0] == order.manifest_sha256[:12]


async def test_old_news_does_not_replace_a_newer_adapter(store: Path, library: AdapterLibrary) -> None:
    old, new = _publish(store, "ftjob-1", created=1), _publish(store, "ftjob-2", content=b"new", created=2)
    publish = consumers.make_published_handler(library)
    for order in (old, new, old):
        await publish(_event(order))
    spec = library.get(ID)
    assert spec is not None and spec.manifest_sha256 == new.manifest_sha256


async def test_news_of_another_base_is_ignored_and_damage_is_a_dead_letter(
    store: Path, library: AdapterLibrary
) -> None:
    publish = consumers.make_published_handler(library)
    await publish(_event(_publish(store, "ftjob-1", base="llama")))
    assert library.get(ID) is None
    damaged = _publish(store, "ftjob-2")
    (store / damaged.path / "adapter_model.safetensors").write_bytes(b"")
    for event in (_event(damaged), Received("s", b"\xff\xff", "m", 1, {})):
        with pytest.raises(PlatformError) as raised:
            await publish(event)
        assert not raised.value.retryable
    with pytest.raises(PlatformError) as raised:
        await publish(_event(replace(damaged, path="adapters/late")))
    assert raised.value.retryable


# The start.


async def test_a_start_loads_the_newest_of_each_and_passes_over_the_damaged(
    stub: Stub, store: Path, library: AdapterLibrary
) -> None:
    _publish(store, "a-newer", "toy:one", b"new", created=9)
    _publish(store, "b-older", "toy:one", b"old", created=3)
    two = _publish(store, "ftjob-2", "toy:two", created=4)
    (store / two.path / "adapter_model.safetensors").write_bytes(b"damaged")
    _publish(store, "ftjob-3", "toy:three", b"sick", created=5)
    _publish(store, "ftjob-4", "toy:four", base="llama")
    _publish(store, "ftjob-5", "toy:five", created=1)
    _publish(store, ".making-6", "toy:six")
    (store / "adapters" / "empty").mkdir()
    (store / "adapters" / "junk").mkdir()
    (store / "adapters" / "junk" / "manifest.json").write_text("{")
    await library.load_all()
    models = {m.id: m.created_unix_s for m in (await stub.ListModels(pb.ListModelsRequest())).models[1:]}
    assert models == {"toy:one": 9, "toy:five": 1}


async def test_a_start_takes_the_newest_where_not_all_have_room(
    engine: BatchingEngine, store: Path, library: AdapterLibrary, loads: Counter[str]
) -> None:
    for number in range(6):
        _publish(store, f"ftjob-{number}", f"toy:{number}", created=number)
    await library.load_all()
    assert [spec.id for spec in engine.adapters()] == ["toy:3", "toy:4", "toy:5"]
    assert loads == Counter(loaded=3, full=1)
    assert [spec.id for spec in library.specs()] == [f"toy:{number}" for number in range(6)]


async def test_a_start_without_adapters_is_a_start(
    engine: BatchingEngine, store: Path, library: AdapterLibrary
) -> None:
    await library.load_all()
    await AdapterLibrary(engine, None).load_all()
    assert engine.adapters() == ()
    with pytest.raises(PlatformError, match="GENERATOR_STORE_DIR"):
        await AdapterLibrary(engine, None).load(AdapterOrder(ID, "adapters/x", "0" * 64))


async def test_a_swap_under_load_loses_nothing(stub: Stub, store: Path) -> None:
    orders = [_publish(store, f"ftjob-{i}", content=f"weights {i}".encode()) for i in range(6)]
    texts = {}
    for order in orders:
        await _load(stub, order)
        version, text = await _generate(stub, ID)
        texts[version] = text
    base = await _generate(stub, "toy")
    swapping = True

    async def ask_on(model: str) -> list[tuple[str, str]]:
        answers = []
        while swapping:
            answers.append(await _generate(stub, model))
        return answers

    asking = [asyncio.create_task(ask_on(model)) for model in (ID, ID, ID, "toy")]
    for order in orders * 2:
        await _load(stub, order)
    swapping = False
    *tuned, plain = await asyncio.gather(*asking)
    assert all(texts[version] == text for answers in tuned for version, text in answers)
    assert len({version for answers in tuned for version, _ in answers}) > 1
    assert plain and set(plain) == {base}
