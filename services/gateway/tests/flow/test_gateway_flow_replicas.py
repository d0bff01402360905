"""Two real generators (without weights) behind one guard: one is killed, nobody notices, it comes back by itself."""

import asyncio
from contextlib import AsyncExitStack, aclosing

import pytest

from chassis import rpc
from chassis.errors import Code, PlatformError
from gateway.backends.generator import GrpcGenerator
from gateway.core.circuit import Circuit, CircuitRules, CircuitState
from gateway.core.guard import Backend, Guard
from gateway.core.guarded import GuardedGenerator
from gateway.core.services import Delta, Finished, Generation, Stopping
from testkit import eventually
from testkit.processes import ServiceProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

MODEL = "smollm2-135m-instruct"
RULES = CircuitRules(consecutive=3, first_open_s=0.2, longest_open_s=1.0)


class Meter:
    def __init__(self):
        self.outcomes = []

    def retried(self, outcome):
        self.outcomes.append(outcome)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Two generators, started."""
    model_dir = tmp_path_factory.mktemp("store") / MODEL
    model_dir.mkdir()
    settings = {"ENGINE": "toy", "MODEL_DIR": model_dir, "NATS_URL": "nats://127.0.0.1:1", "MAX_MODEL_LEN": 1024}
    both = [ServiceProcess("generator", settings) for _ in range(2)]
    try:
        for process in both:
            process.start()
        yield both
    finally:
        for process in both:
            process.close()


@pytest.fixture
async def guarded(processes):
    """Both of them as one generator, and what the guard knows of each."""
    async with AsyncExitStack() as channels:
        backends = []
        for process in processes:
            channel = await channels.enter_async_context(rpc.connect(process.address))
            backends.append(Backend(process.address, GrpcGenerator(channel), Circuit(RULES)))
        yield GuardedGenerator(Guard("generator", backends, Meter())), backends


def call(most=4):
    return Generation(MODEL, "hello", "acme", stopping=Stopping(max_tokens=most, ignore_eos=True))


async def ask(generator, most=4, timeout_s=30.0):
    """Answers whether a token came, and the error that ended the stream, if one did."""
    has_token = False
    try:
        async with aclosing(generator.generate(call(most), timeout_s=timeout_s)) as events:
            async for event in events:
                has_token = has_token or isinstance(event, Delta)
    except PlatformError as error:
        return has_token, error
    return has_token, None


def served(process):
    return process.metric("pressroom_requests_total", method="Generate", code="OK")


async def test_a_killed_replica_is_not_noticed_before_the_first_token_and_comes_back_by_itself(processes, guarded):
    generator, backends = guarded
    outcomes, is_over = [], False

    async def client():
        while not is_over:
            outcomes.append(await ask(generator))

    clients = [asyncio.create_task(client()) for _ in range(6)]
    await eventually(lambda: len(outcomes) > 60 and all(served(process) > 5 for process in processes), timeout_s=60)
    await asyncio.to_thread(processes[0].kill9)
    await eventually(lambda: backends[0].breaker.state is not CircuitState.CLOSED, timeout_s=30)
    num_then = len(outcomes)
    await eventually(lambda: len(outcomes) > num_then + 60, timeout_s=60)
    await asyncio.to_thread(processes[0].start)
    before = served(processes[0])
    await eventually(
        lambda: backends[0].breaker.state is CircuitState.CLOSED and served(processes[0]) > before + 5, timeout_s=60
    )
    is_over = True
    await asyncio.gather(*clients)
    errors = [(has_token, error) for has_token, error in outcomes if error is not None]
    assert [error for has_token, error in errors if not has_token] == []
    assert len(errors) <= 6  # of the streams that the killed one was in the middle of


async def test_deadline_and_cancel_reach_the_generator_through_the_guard(processes, guarded):
    generator, backends = guarded
    async with aclosing(generator.generate(call(900), timeout_s=30.0)) as events:
        async for event in events:
            if isinstance(event, Delta):
                break
    await eventually(lambda: sum(p.metric("pressroom_running_sequences") for p in processes) == 0)
    ended = []
    try:
        async with aclosing(generator.generate(call(900), timeout_s=0.2)) as events:
            ended = [event.reason async for event in events if isinstance(event, Finished)]
    except PlatformError as error:
        ended = [error.code]
    assert ended in (["deadline"], [Code.DEADLINE_EXCEEDED])
    await eventually(lambda: sum(p.metric("pressroom_running_sequences") for p in processes) == 0)
    assert [backend.breaker.state for backend in backends] == [CircuitState.CLOSED] * 2
    assert [backend.num_running for backend in backends] == [0, 0]
