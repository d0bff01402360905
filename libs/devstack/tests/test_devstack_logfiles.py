import json
from pathlib import Path

from devstack import logfiles
from devstack.logfiles import LogFile


def _line(second: int, message: str, **fields: object) -> str:
    return json.dumps({"ts": f"2026-11-23T20:00:{second:02}.000+00:00", "level": "INFO", "message": message} | fields)


def test_log_file_is_rotated_and_bounded(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "toy.log", max_bytes=1000)
    for number in range(100):
        log.write(f"{number:>49}\n".encode())
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"toy.log", "toy.log.1"}
    assert max(sizes.values()) <= 1000
    assert (tmp_path / "toy.log").read_text().split()[-1] == "99"


def test_tail_tells_of_the_newest_process_alone(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "toy.log")
    log.write(b"old\n")
    log.mark_start()
    log.write(b"new\n" + _line(1, "worse", code=3).encode() + b"\n")
    tail = log.tail()
    assert tail[0] == "new" and "worse" in tail[1] and "code=3" in tail[1]
    assert "old" not in "".join(tail)


def test_unwritable_log_loses_lines_and_not_the_service(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "missing" / "toy.log")
    log.write(b"lost\n")
    assert log.num_lost_bytes == 5
    assert log.tail() == ["lost"]


def test_plain_lines_take_their_own_time_or_that_of_the_line_before(tmp_path: Path) -> None:
    path = tmp_path / "nats.log"
    path.write_text(_line(5, "json") + "\ncontinued\n[7] 2026/11/23 20:25:12.123456 [INF] Server is ready\n")
    first, second, third = logfiles.read(path)
    assert second.unix_s == first.unix_s
    assert third.unix_s != first.unix_s and third.unix_s > 0
    assert first.service == "nats"


def test_lines_of_a_request_are_found_by_request_and_by_trace_id() -> None:
    entry = logfiles.parse(_line(1, "x", request_id="req_1", trace_id="abc"), "gateway", 0.0)
    assert entry.concerns("req_1") and entry.concerns("abc") and not entry.concerns("req_2")
