"""`pressroom top` from texts of /metrics: what is parsed, what an interval brought, and how it is drawn."""

import http.server
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from devstack.cores import Cores, CoreUse
from devstack.scrapes import EMPTY, Change, Scrape, ScrapeFailed, fetch, parse
from devstack.top import Look, compare
from devstack.top_screen import render


def _metrics(start: int = 1000, answers: int = 0, tokens: int = 0, running: int = 2, hits: int = 0) -> str:
    """A generator's text after so many answers: TTFT up to 0.1 s for half of them, up to 0.25 s for the others."""
    return f"""
# HELP process_start_time_seconds Start time.
# TYPE process_start_time_seconds gauge
process_start_time_seconds {start}
# TYPE process_resident_memory_bytes gauge
process_resident_memory_bytes 4.1e+08
# TYPE pressroom_requests_total counter
pressroom_requests_total{{service="generator",method="Generate",code="OK"}} {answers}
pressroom_requests_total{{service="generator",method="Generate",code="INTERNAL"}} {answers / 10}
# TYPE pressroom_running_sequences gauge
pressroom_running_sequences{{service="generator"}} {running}
# TYPE pressroom_waiting_sequences gauge
pressroom_waiting_sequences{{service="generator"}} 1
# TYPE pressroom_kv_blocks_used gauge
pressroom_kv_blocks_used{{service="generator"}} 91
# TYPE pressroom_kv_blocks_capacity gauge
pressroom_kv_blocks_capacity{{service="generator"}} 364
# TYPE pressroom_prefix_query_tokens_total counter
pressroom_prefix_query_tokens_total{{service="generator"}} {2 * hits}
# TYPE pressroom_prefix_hit_tokens_total counter
pressroom_prefix_hit_tokens_total{{service="generator"}} {hits}
# TYPE pressroom_engine_tokens_total counter
pressroom_engine_tokens_total{{service="generator",kind="prompt"}} {3 * tokens}
pressroom_engine_tokens_total{{service="generator",kind="completion"}} {tokens}
# TYPE pressroom_batch_sequences histogram
pressroom_batch_sequences_bucket{{service="generator",le="8.0"}} {tokens // 4}
pressroom_batch_sequences_bucket{{service="generator",le="+Inf"}} {tokens // 4}
pressroom_batch_sequences_count{{service="generator"}} {tokens // 4}
pressroom_batch_sequences_sum{{service="generator"}} {tokens}
# TYPE pressroom_step_seconds histogram
pressroom_step_seconds_bucket{{service="generator",part="forward",le="+Inf"}} {tokens // 4}
pressroom_step_seconds_count{{service="generator",part="forward"}} {tokens // 4}
pressroom_step_seconds_sum{{service="generator",part="forward"}} {tokens // 4 * 0.02}
# TYPE pressroom_tokens_total counter
pressroom_tokens_total{{service="generator",model="m:a \\"b\\"",kind="completion"}} {tokens}
# TYPE pressroom_ttft_seconds histogram
pressroom_ttft_seconds_bucket{{service="generator",model="m:a \\"b\\"",le="0.05"}} 0
pressroom_ttft_seconds_bucket{{service="generator",model="m:a \\"b\\"",le="0.1"}} {answers / 2}
pressroom_ttft_seconds_bucket{{service="generator",model="m:a \\"b\\"",le="0.25"}} {answers}
pressroom_ttft_seconds_bucket{{service="generator",model="m:a \\"b\\"",le="+Inf"}} {answers}
pressroom_ttft_seconds_count{{service="generator",model="m:a \\"b\\""}} {answers}
pressroom_ttft_seconds_sum{{service="generator",model="m:a \\"b\\""}} {answers * 0.1}
"""


def _row(name: str, state: str = "ready", pid: int | None = 7, **fields: Any) -> dict[str, Any]:
    return {"name": name, "state": state, "pid": pid, "http_port": 1, "queue_depth": 0, "restarts": 0} | fields


def _look(at_s: float, text: str | None, **row: Any) -> Look:
    rows = (_row("generator", **row), _row("nats", pid=8))
    scrapes = {} if text is None else {"generator": parse(text)}
    failures = {"generator": "no answer within 1 s"} if text is None and row.get("pid", 7) else {}
    return Look(at_s, rows, scrapes, failures)


USED = Cores({7: CoreUse(1.25), 8: CoreUse(0.01)}, 1.5, 2)


def test_samples_are_found_by_name_and_labels() -> None:
    scrape = parse(_metrics(tokens=400))
    assert scrape.total("pressroom_engine_tokens_total") == 1600
    assert scrape.total("pressroom_engine_tokens_total", kind="completion") == 400
    assert scrape.total("pressroom_engine_tokens_total", kind="none") is None and scrape.total("other") is None
    assert scrape.values_of("pressroom_tokens_total", "model") == {'m:a "b"'}


@pytest.mark.parametrize("text", ['a{b="c} 1', "a one", "<html>busy</html>"])
def test_what_is_no_metrics_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ScrapeFailed):
        parse(text)


def test_a_change_counts_what_is_new() -> None:
    change = Change(parse(_metrics(tokens=400)), parse(_metrics(tokens=1000)), 2.0)
    assert change.rate("pressroom_engine_tokens_total", kind="completion") == 300
    assert change.mean("pressroom_batch_sequences") == 4
    assert change.mean("pressroom_step_seconds", part="forward") == pytest.approx(0.02)
    assert change.mean("pressroom_step_seconds", part="sample") is None
    assert change.increase("pressroom_preemptions_total") is None


def test_after_a_restart_everything_is_new() -> None:
    change = Change(parse(_metrics(tokens=400)), parse(_metrics(start=2000, tokens=500)), 1.0)
    assert change.increase("pressroom_engine_tokens_total", kind="completion") == 500


def test_quantiles_are_of_the_interval_alone() -> None:
    slow = Scrape({"t_bucket": (({"le": "1.0"}, 0.0), ({"le": "5.0"}, 90.0), ({"le": "+Inf"}, 90.0))})
    both = Scrape({"t_bucket": (({"le": "1.0"}, 10.0), ({"le": "5.0"}, 100.0), ({"le": "+Inf"}, 100.0))})
    assert Change(slow, both, 1.0).quantile(0.5, "t") == 0.5  # all ten new ones took less than a second
    assert Change(EMPTY, both, 1.0).quantile(0.95, "t") == pytest.approx(1 + 4 * 85 / 90)
    assert Change(both, both, 1.0).quantile(0.95, "t") is None
    beyond = Scrape({"t_bucket": (({"le": "1.0"}, 1.0), ({"le": "+Inf"}, 9.0))})
    assert Change(EMPTY, beyond, 1.0).quantile(0.95, "t") == 1.0


def test_an_interval_is_told_in_full() -> None:
    before, after = _metrics(tokens=400, answers=0), _metrics(tokens=1000, answers=20, hits=640)
    view = compare(_look(10.0, before), _look(12.0, after), USED)
    engine = view["engine"]
    assert (engine["running"], engine["waiting"], engine["blocks_used"], engine["blocks_total"]) == (2, 1, 91, 364)
    assert (engine["prompt_tokens_per_s"], engine["completion_tokens_per_s"]) == (900, 300)
    assert (engine["batch_mean"], engine["step_s"]["forward"], engine["prefix_hit_share"]) == (4, 0.02, 0.5)
    assert engine["preemptions"] is None and engine["draft_accepted_share"] is None
    (model,) = view["models"]
    assert (model["model"], model["answers"], model["completion_tokens_per_s"]) == ('m:a "b"', 20, 300)
    assert (model["ttft_p50_s"], model["ttft_p95_s"], model["tpot_p50_s"]) == (0.1, 0.235, None)
    generator, nats = view["services"]
    assert (generator["requests_per_s"], generator["faults_per_s"], generator["cpu_cores"]) == (11, 1, 1.25)
    assert (nats["state"], nats["requests_per_s"], nats["rss_bytes"]) == ("ready", None, None)
    assert view["ready"] and json.loads(json.dumps(view)) == view


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (_look(12.0, None, state="stopped", pid=None), "generator: stopped"),
        (_look(12.0, None, state="restarting", pid=None, detail="ended with -9"), "generator: restarting (ended"),
        (_look(12.0, None), "no answer within 1 s"),
    ],
)
def test_a_service_that_is_away_is_shown_as_away(after: Look, words: str) -> None:
    view = compare(_look(10.0, _metrics()), after, USED)
    assert view["engine"] is None and view["models"] == [] and words in view["engine_detail"]
    assert words in _drawn(view)


def test_it_comes_back_with_figures() -> None:
    view = compare(_look(10.0, None, state="restarting", pid=None), _look(12.0, _metrics(tokens=100)), USED)
    assert view["engine"]["completion_tokens_per_s"] == 50


def _drawn(view: dict[str, Any], width: int = 140) -> str:
    console = Console(width=width, no_color=True, record=True, file=io.StringIO())
    console.print(render(view))
    return console.export_text()


def test_the_screen_shows_every_figure_and_a_dash_for_those_that_nobody_gave() -> None:
    before, after = _metrics(tokens=400, answers=0), _metrics(tokens=1000, answers=20, hits=640)
    text = _drawn(compare(_look(10.0, before), _look(12.0, after), USED))
    for words in ("900 in, 300 out", "2 run, 1 wait, batch 4, - set back", "91 of 364 blocks (25%)", "hits 50%"):
        assert words in text
    assert 'm:a "b"' in text and "100 ms" in text and "235 ms" in text and "410 MB" in text
    assert "forward 20 ms, sample -" in text


@pytest.fixture
def port() -> Iterator[int]:
    """A server that answers by path number: 200 with metrics, then 500."""
    answers = iter((200, 500))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(next(answers))
            self.end_headers()
            self.wfile.write(b"a_total 1\n")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_scrape_over_http(port: int) -> None:
    assert fetch(port, 5.0).total("a_total") == 1
    with pytest.raises(ScrapeFailed, match="500"):
        fetch(port, 5.0)


def test_a_port_where_nobody_listens_is_a_failure_with_its_reason() -> None:
    with pytest.raises(ScrapeFailed, match="refused"):
        fetch(1, 1.0)
