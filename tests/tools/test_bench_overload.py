"""The parts of tools/bench_overload: a backend of a fixed capacity, and a load that does not wait for its answers."""

import asyncio
import math
import time

from aiohttp import web
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc

from bench_overload import load
from bench_overload.backend import Capacity, serve
from bench_overload.load import Stream
from chassis import rpc


async def test_the_backend_runs_so_many_at_once_and_no_more():
    capacity = Capacity(slots=2, prompt_token_s=0.0, token_s=0.01)
    server, address = await serve(capacity)
    try:
        async with rpc.connect(address) as channel:
            stub = generator_pb2_grpc.GeneratorServiceStub(channel)

            async def one():
                request = pb.GenerateRequest(text="abcd" * 5, stop=pb.StopParams(max_tokens=20))
                return [event async for event in stub.Generate(request)]

            began_s = time.monotonic()
            answers = await asyncio.gather(*(one() for _ in range(6)))
            took_s = time.monotonic() - began_s
    finally:
        await server.stop(None)
    assert took_s >= 6 / capacity.per_s(5, 20) * 0.7  # 0.7: the fastest that a request may be
    for events in answers:
        assert [event.WhichOneof("event") for event in events] == ["started", "delta", "finished", "done"]
        assert (events[-1].done.usage.prompt_tokens, events[-1].done.usage.completion_tokens) == (5, 20)


async def test_requests_come_whether_those_before_are_answered_or_not():
    open_now = most_open = 0

    async def completions(request):
        nonlocal open_now, most_open
        open_now += 1
        most_open = max(most_open, open_now)
        await asyncio.sleep(0.3)
        open_now -= 1
        return web.json_response({}, status=200 if request.headers["authorization"] == "Bearer good" else 503)

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    streams = [Stream("a", "good", 50.0, 10, 5, 60.0), Stream("b", "bad", 20.0, 10, 5, 60.0)]
    try:
        outcomes = await load.run(f"http://127.0.0.1:{port}", streams, 1.0, seed=3)
    finally:
        await runner.cleanup()
    good = [one for one in outcomes if one.tenant == "a"]
    assert most_open > 5 and 25 <= len(good) <= 80
    assert all(one.is_in_time and one.tokens == 15 for one in good)
    assert all(one.status == 503 and not one.is_in_time and one.tokens == 0 for one in outcomes if one.tenant == "b")


def test_a_percentile_is_a_value_that_was_seen():
    assert load.percentile([3.0, 1.0, 2.0], 0.5) == 2.0 and load.percentile([1.0, 2.0], 0.95) == 2.0
    assert math.isnan(load.percentile([], 0.5))
