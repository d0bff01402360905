"""The logic of tools/bench_gateway: what counts as an answer, what is added, what is a broken promise."""

import asyncio

import pytest

from bench_gateway import doors, figures, load
from bench_gateway.load import Answer, Run
from testkit.servers import running

RIGHT = (10, 16)


def level(name, **ttfts_ms):
    """A level with one turn of a second for each door."""
    made = figures.Level(name)
    for door, values in ttfts_ms.items():
        answers = [Answer(value / 1000, RIGHT) for value in values]
        made.turns[door].append(figures.Turn(Run(answers, 1.0), cpu_s=0.001 * len(answers)))
    return made


@pytest.fixture
def mock():
    with running(doors.Mock(doors.OWN_MOCK, 0.0)) as server:
        yield server


@pytest.mark.integration
@pytest.mark.parametrize("keeps_alive", [True, False])
def test_the_client_reads_what_the_mock_says(mock, keeps_alive):
    async def ask():
        client = load.Client(load.Target(mock.url, "mock", "none"), keeps_alive=keeps_alive)
        run = await load.closed_loop(client, num_streams=4, num_requests=20)
        client.close()
        return run

    run = asyncio.run(ask())
    assert [answer.usage for answer in run.whole] == [RIGHT] * 20
    assert all(0 < answer.ttft_s < run.wall_s for answer in run.whole)


@pytest.mark.integration
def test_streams_that_stand_are_counted_and_left():
    with running(doors.Mock(doors.OWN_MOCK, 0.5)) as paced:
        client = load.Client(load.Target(paced.url, "mock", "none"))
        assert asyncio.run(load.while_idle(client, num_streams=5, measure=lambda: 7)) == (7, 5)


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [{"delta": {"content": "cut off"}}]}\n\n',
        b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [{"delta": {}}]}\n\ndata: [DONE]\n\n',
    ],
)
async def test_what_has_no_text_or_no_end_is_no_answer(said):
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        answer = await load.Client(load.Target(f"http://127.0.0.1:{port}/v1", "m", "k")).ask()
    assert answer.error and answer.usage is None


def test_what_is_added_is_beyond_the_mocks_own_time():
    measured = level("1 stream", direct=[1.0] * 10, gateway=[2.5] * 9 + [8.0])
    assert measured.added_s("gateway", 50) == pytest.approx(0.0015)
    assert measured.added_s("gateway", 99) == pytest.approx(0.007)
    assert measured.requests_per_s("gateway") == 10 and measured.cpu_ms("gateway") == pytest.approx(1.0)


def test_promises_are_judged():
    kept = figures.Results([level("1 stream", direct=[1.0], gateway=[2.9])], idle={"gateway": (1e8, 1000)})
    assert figures.broken_promises(kept) == []
    slow = level("1 stream", direct=[1.0], gateway=[3.1])
    loaded = level("64 streams", direct=[1.0], gateway=[1.0] * 5, litellm=[1.0])
    loaded.turns["gateway"][0].run.answers += [Answer(0.1, (73, 17)), Answer(0.0, None, "refused")]
    broken = figures.Results([slow, loaded], idle={"gateway": (3e8, 1000)})
    said = "\n".join(figures.broken_promises(broken))
    for part in ("p50 adds 2.10 ms", "idle streams take 300 MB", "wrong usage", "1 requests"):
        assert part in said
    assert "| usage | right | wrong in 1, such as (73, 17) |" in figures.table(broken, ["direct", "gateway"])


def test_fewer_than_six_times_the_peers_requests_is_a_broken_promise():
    loaded = level("64 streams", direct=[1.0], gateway=[1.0] * 5, litellm=[1.0])
    (said,) = figures.broken_promises(figures.Results([loaded]))
    assert "5.0 times LiteLLM's requests/s" in said
