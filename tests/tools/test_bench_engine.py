"""The logic of tools/bench_engine: what a figure is, whose turn it is, what is gone on with. No engine is needed."""

import asyncio
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from pressroom.common.v1 import common_pb2
from pressroom.generator.v1 import generator_pb2 as pb

from bench_engine import answers, behaviour, clients, figures, greedy, speed
from bench_engine.answers import Answer, Run
from bench_engine.engines import EngineError, read_piped
from testkit.ports import free_port


def an_answer(began_s: float = 0.0, first_s: float = 0.5, num_tokens: int = 4, error: str = "") -> Answer:
    stamps = [first_s + 0.1 * number for number in range(num_tokens)]
    return Answer(began_s, stamps, prompt_tokens=95, completion_tokens=num_tokens, error=error)


class Scripted:
    """An engine that answers at once, and notes what it was asked while the others stood still."""

    def __init__(self, name: str, log: list[str], fails_at: int | None = None) -> None:
        self.name, self.pids = name, ()
        self._log, self._fails_at, self._num_runs = log, fails_at, 0
        self.is_frozen = self.is_closed = False

    async def start(self) -> float | None:
        self._log.append(f"start {self.name}")
        return 1.5

    async def run(self, prompts: Sequence[str], max_tokens: int, num_streams: int) -> Run:
        assert not self.is_frozen
        self._num_runs += 1
        if self._fails_at == self._num_runs:
            raise EngineError("it broke")
        self._log.append(f"{self.name} {num_streams} x{max_tokens}")
        return Run(2.0, tuple(an_answer(num_tokens=max_tokens) for _ in prompts))

    def freeze(self, frozen: bool) -> None:
        self.is_frozen = frozen

    async def close(self) -> None:
        self.is_closed = True


def test_a_percentile_is_a_value_that_was_seen():
    values = [0.4, 0.1, 0.3, 0.2]
    assert [figures.percentile(values, p) for p in (0, 50, 95, 100)] == [0.1, 0.3, 0.4, 0.4]
    assert math.isnan(figures.percentile([], 50))


def test_a_level_counts_only_answers_that_are_whole():
    run = Run(2.0, (an_answer(), an_answer(first_s=1.5), an_answer(error="503"), an_answer(num_tokens=3)))
    row = figures.level("ours", 8, 0, run, expected_tokens=4)
    assert (row.tokens_per_s, row.num_answers, row.num_failed) == (4.0, 4, 2)
    assert (row.ttft_p50_s, row.ttft_p95_s) == (1.5, 1.5)
    assert row.gap_p95_s == pytest.approx(0.1)


def test_medians_are_over_rounds_and_the_verdict_is_over_the_best_peer():
    rows = [
        figures.level(engine, 8, number, Run(wall_s, (an_answer(first_s=first_s),)), expected_tokens=4)
        for engine, first_s, walls in (("slow", 0.2, (8, 4, 2)), ("fast", 0.4, (2, 2, 2)), ("ours", 0.5, (1, 4, 1)))
        for number, wall_s in enumerate(walls)
    ]
    assert figures.medians(rows)["slow", 8].tokens_per_s == 1.0
    assert (figures.medians(rows)["ours", 8].lowest, figures.medians(rows)["ours", 8].highest) == (1.0, 4.0)
    (line,) = figures.verdict(rows, "ours", "gateway", ["slow", "fast"])
    assert "2.00 times the best peer (fast)" in line and line.endswith("WORSE")
    assert "| ours | 4.0 (1-4) |" in figures.table(rows, {"ours": (1.5, 2e8)})


async def test_a_closed_loop_keeps_so_many_under_way_and_asks_each_once():
    under_way, most, asked = 0, 0, []

    async def ask(prompt: str, max_tokens: int) -> Answer:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(random.Random(prompt).random() / 100)
        under_way -= 1
        asked.append(prompt)
        return an_answer()

    run = await answers.closed_loop(ask, [f"p{number}" for number in range(11)], 4, 3)
    assert (most, len(run.answers), sorted(asked)) == (3, 11, sorted(f"p{number}" for number in range(11)))


def test_engines_take_turns_and_no_prompt_is_asked_twice():
    plan = speed.Plan(streams=(1, 8), rounds=2)
    assert list(speed.turns(["a", "b"], plan)) == [
        (number, engine, streams) for number in (0, 1) for engine in ("a", "b") for streams in (1, 8)
    ]
    wide = speed.Plan(streams=(1, 8, 64, 256), rounds=3)
    seeds = [seed for number in range(3) for streams in wide.streams for seed in speed.seeds(wide, number, streams)]
    assert len(seeds) == len(set(seeds))
    assert answers.prompt(3) == answers.prompt(3) != answers.prompt(4)


async def test_a_run_goes_on_where_another_ended_and_without_an_engine_that_broke(tmp_path: Path):
    plan, log = speed.Plan(streams=(1, 2), rounds=2, max_tokens=4, warm_up_tokens=2), list[str]()
    engines = [Scripted("a", log), Scripted("b", log, fails_at=4)]  # in the measured loop of its second level
    failed = await speed.measure(engines, plan, speed.Results(tmp_path / "speed.json"), log.append)
    assert failed == {"b": "it broke"} and all(engine.is_closed for engine in engines)
    assert [line for line in log if line.endswith("x4")] == ["a 1 x4", "a 2 x4", "b 1 x4", "a 1 x4", "a 2 x4"]

    log.clear()
    results = speed.Results(tmp_path / "speed.json")
    assert await speed.measure([Scripted("a", log), Scripted("b", log)], plan, results, log.append) == {}
    assert "start a" not in log, "nothing of it was left"
    assert [line for line in log if line.endswith("x4")] == ["b 2 x4", "b 1 x4", "b 2 x4"]
    assert len(results.levels) == 8 and results.cost["b"] == (1.5, None)
    assert "| a | " in speed.report(results, plan, "a", "gateway", ["b"])


async def test_the_http_client_reads_a_stream_and_tells_a_refusal():
    events = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "Ink"}}]},
        {"choices": [{"delta": {"content": " dries"}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 95, "completion_tokens": 2}},
    ]
    asked: list[dict[str, object]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        (length,) = (int(line.split(":")[1]) for line in head.splitlines() if line.startswith("Content-Length"))
        asked.append(json.loads(await reader.readexactly(length)))
        if len(asked) > 1:
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\n\r\nlater")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
            writer.write(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))
            writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()

    port = free_port()
    async with await asyncio.start_server(serve, "127.0.0.1", port):
        client = clients.HttpClient(f"http://127.0.0.1:{port}/v1", "m", "k")
        answer, refused = await client.ask("hello", 2), await client.ask("hello", 2)
    assert (answer.error, answer.text, answer.completion_tokens, len(answer.stamps)) == ("", "Ink dries", 2, 2)
    assert asked[0]["ignore_eos"] is True and asked[0]["temperature"] == 0 and asked[0]["max_tokens"] == 2
    assert refused.error.startswith("429") and not refused.stamps
    assert (await client.ask("hello", 2)).error, "nobody listens"


def test_the_grpc_client_counts_pieces_with_text_and_the_servers_usage():
    answer = Answer(0.0)
    usage = common_pb2.Usage(prompt_tokens=95, completion_tokens=3, cached_tokens=16)
    for message in (
        pb.GenerateResponse(started=pb.Started(prompt_tokens=95)),
        pb.GenerateResponse(delta=pb.Delta(text="", token_ids=[7])),
        pb.GenerateResponse(delta=pb.Delta(text="ink", token_ids=[8, 9])),
        pb.GenerateResponse(done=pb.Done(usage=usage)),
    ):
        clients.read(message, answer)
    assert (answer.token_ids, len(answer.stamps), answer.completion_tokens) == ([7, 8, 9], 1, 3)
    assert (answer.text, answer.cached_tokens) == ("ink", 16)


def test_what_a_piped_peer_tells_is_read_as_a_run():
    told = {"wall_s": 2.0, "answers": [{"began_s": 1.0, "stamps": [1.25, 1.5], "tokens": 4, "prompt_tokens": 95}]}
    row = figures.level("peer", 1, 0, read_piped(json.loads(json.dumps(told))), expected_tokens=4)
    assert (row.tokens_per_s, row.ttft_p50_s, row.gap_p95_s, row.prompt_tokens) == (2.0, 0.25, 0.25, 95)


def test_a_stream_that_stands_still_counts_as_a_gap():
    moving = Answer(0.0, [0.0, 1.0, 1.1, 1.2, 2.5])
    still = Answer(0.0, [0.0, 0.9, 3.0])
    assert behaviour.gaps_within([moving], 1.05, 1.3) == pytest.approx([0.1, 0.1])
    assert behaviour.gaps_within([still], 1.0, 2.0) == pytest.approx([1.1])


def test_greedy_texts_part_where_they_first_differ_and_the_margin_is_the_references():
    logits = np.zeros((4, 6), dtype=np.float32)
    for place, best in enumerate((1, 2, 3, 4)):
        logits[place, best] = 1.0
    logits[2, 5] = 0.97
    assert greedy.compare([1, 2, 3, 4], logits) == greedy.Comparison(4, None, None, 4)
    near = greedy.compare([1, 2, 5, 4], logits)
    assert (near.parted_at, near.agreed) == (2, 3) and near.margin == pytest.approx(0.03)
    far = greedy.compare([1, 0, 3, 4], logits)
    assert far.parted_at == 1 and far.margin == pytest.approx(1.0)
    text = greedy.report([greedy.compare([1, 2, 3, 4], logits), near, far], "it")
    assert "3 prompts, 12 tokens. 1 answers equal" in text
    assert "1 parted where the top two differ by less than 0.05 (allowed), 1 parted elsewhere" in text


def test_prompts_are_read_in_each_of_their_forms(tmp_path: Path):
    lines = [{"prompt": "a"}, {"text": "b"}, {"turns": ["c", "d"]}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert greedy.read_prompts(path, 9) == ["a", "b", "c"] and greedy.read_prompts(path, 1) == ["a"]
