"""The report: one file that asks for nothing else, with the figures of its rows, in words that hold."""

import json
import re
from html.parser import HTMLParser

import pytest

from loadtest import recording, report, tables
from loadtest.charts import Line, line_chart, nice_step, number
from loadtest.recording import Recording
from loadtest.summary import Slo

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def record(folder, capacity=40.0, loads=(1, 2, 4, 8, 16), name="chat"):
    """Users that share a capacity in tokens/s: 10 tokens/s each while there is room, waiting in proportion beyond."""
    clock = Clock()
    made = Recording(folder, offered_unit="users", slo=Slo(1.0, 0.5), conditions={"system": "<b>&"}, clock=clock)
    for load in loads:
        made.enter(load)
        start_s = clock.now_s - 50.0
        each_tokens_per_s = min(10.0, capacity / load)
        for user in range(load):
            row = made.row(name, "m", start_s)
            row.sent_s, row.first_token_s = start_s, start_s + 0.2 * load
            row.num_chunks = row.completion_tokens = round(each_tokens_per_s * (10 - 0.2 * load)) + 1
            row.last_token_s = row.done_s = start_s + 9.999
            row.prompt_tokens, row.status = 30, 200
            if load == 16 and user == 0:
                row.error, row.status = "overloaded <script>", 503
            made.add(row)
        clock.now_s += 10.0
    return made.finish()


class Reader(HTMLParser):
    """Checks that every element is closed in order, and collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def figures(tmp_path):
    return report.Figures(record(tmp_path))


def test_the_page_is_whole_and_fetches_nothing(figures):
    page = report.page(figures)
    reader = read(page)
    assert reader.outside == []
    assert "script" not in reader.tags and "link" not in reader.tags
    assert not re.search(r"https?://|url\(|@import", page.replace("http://www.w3.org/2000/svg", ""))
    assert reader.tags.count("svg") == 10
    assert "prefers-color-scheme: dark" in page


def test_the_page_says_what_the_rows_say(figures):
    text = " ".join(read(report.page(figures)).text)
    assert "503 overloaded <script>" in text, "text of a server is escaped, and read back it is itself"
    assert "<b>&" in text
    ok = sum(row.outcome == "ok" for row in figures.recorded.rows)
    assert f"{ok} answered" in text


def test_the_knee_of_shared_capacity_is_where_the_capacity_is_reached(figures):
    assert figures.knee_step.window.offered == 4
    said = " ".join(report.verdict(figures))
    assert "The knee is at 4 users" in said
    assert "From there to 16 users" in said


def test_mixed_traffic_is_told_apart(tmp_path):
    rows = record(tmp_path / "a").rows
    assert "By traffic" not in report.page(report.Figures(recording.read(tmp_path / "a")))
    mixed = recording.read(tmp_path / "a")
    for row in mixed.rows[::2]:
        row.kind = "grounded"
    figures = report.Figures(mixed)
    assert sum(kind.num_due for kind in figures.kinds.values()) == len(rows)
    assert "By traffic" in report.page(figures)


def test_the_load_within_the_objectives_is_told(figures):
    """0.2 s for each user: the objective of 1 s holds up to 4 users."""
    assert figures.within_slo.window.offered == 4
    assert any("up to 4 users" in sentence for sentence in report.verdict(figures))


def test_a_report_is_made_again_from_what_lies_in_the_folder(tmp_path, figures):
    again = recording.read(tmp_path)
    assert report.page(report.Figures(again)) == report.page(figures)
    assert json.loads((tmp_path / "run.json").read_text())["windows"][0]["offered"] == 1


def test_a_test_that_was_killed_leaves_enough_for_a_report(tmp_path):
    """Rows and steps so far; the step that ran is not told, as nobody knows when it ended."""
    clock = Clock()
    made = Recording(tmp_path, offered_unit="users", slo=Slo(1, 1), conditions={}, clock=clock)
    for load in (1, 2):
        made.enter(load)
        row = made.row("chat", "m")
        row.error = "timeout"
        made.add(row)
        clock.now_s += 5
    figures = report.Figures(recording.read(tmp_path))
    assert [step.window.offered for step in figures.steps] == [1]
    assert len(figures.recorded.rows) == 2
    read(report.page(figures))


def test_a_test_without_a_single_answer_has_a_report_too(tmp_path):
    clock = Clock()
    made = Recording(tmp_path, offered_unit="users", slo=Slo(1, 1), conditions={}, clock=clock)
    made.enter(1)
    row = made.row("chat", "m")
    row.error = "connection_refused"
    made.add(row)
    clock.now_s += 5
    empty = report.Figures(made.finish())
    read(report.page(empty))
    assert "No step of load was within the objectives" in " ".join(report.verdict(empty))
    assert "–" in tables.as_text(empty.steps, "users")


def test_a_chart_leaves_gaps_where_nothing_was_measured():
    svg = line_chart("t", [0, 1, 2, 3], [Line("a", [1.0, None, 2.0, 3.0])], x_title="x", y_title="y")
    (path,) = re.findall(r'<path class="c1" d="([^"]+)"', svg)
    assert path.count("M") == 2
    assert svg.count("<circle") == 3


@pytest.mark.parametrize("highest", [0.003, 0.7, 1.0, 9.9, 52, 1e6])
def test_the_grid_has_few_round_lines(highest):
    step = nice_step(highest)
    assert 2 <= highest / step <= 6
    assert f"{step:e}"[0] in "125"


def test_numbers_have_three_digits():
    assert [number(v) for v in (None, 0, 0.01234, 1.2345, 52.34, 1234.5)] == [
        "–",
        "0",
        "0.0123",
        "1.23",
        "52.3",
        "1,234",
    ]
