"""The commands of the model store, run as the command line runs them, on a store of this test's own."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from devstack import measures
from devstack.api import Api
from devstack.cli import app, models
from devstack.cli.failures import report
from devstack.home import Home
from modelstore.manifest import write_manifest

RUNNER = CliRunner()


@pytest.fixture
def store(home: Home, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRESSROOM_HOME", str(home.root))
    for model_id, kind, config in (
        ("tiny", "llm", {"dtype": "bfloat16", "quantisation": {"int4": {"file": "model.int4.safetensors"}}}),
        ("tiny:mine", "adapter", {"base": "tiny"}),
    ):
        folder = home.models / ("adapters/job-1" if kind == "adapter" else model_id)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"w" * 2_000_000)
        (folder / "model.int4.safetensors").write_bytes(b"q" * 500_000)
        source = {"type": "folder", "name": "Tiny"}
        write_manifest(folder, model_id=model_id, kind=kind, created_unix_s=86400, source=source, config=config)
    return home.models


def _run(*arguments: str) -> tuple[int, str]:
    done = RUNNER.invoke(app, ["models", *arguments])
    if done.exception is None or isinstance(done.exception, SystemExit):
        return done.exit_code, done.stdout
    assert isinstance(done.exception, Exception)
    return report(done.exception), done.stdout


def _serve(monkeypatch: pytest.MonkeyPatch, home: Path, *served: str) -> None:
    """As if the system ran and told what it serves."""
    from devstack import lifecycle

    (home / "env").write_text("PRESSROOM_BASE_URL=http://gateway/v1\nPRESSROOM_API_KEY=k\n")
    rows = [{"id": one, "owned_by": "pressroom"} for one in served]
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"data": rows}))
    monkeypatch.setattr(lifecycle, "is_running", lambda home: True)
    made = Api.__init__
    monkeypatch.setattr(Api, "__init__", lambda self, url, key: made(self, url, key, transport))


def test_list_tells_kind_size_and_formats_and_nothing_of_serving_while_nothing_runs(store: Path) -> None:
    code, text = _run("list")
    lines = [line.split() for line in text.splitlines()]
    assert code == 0 and lines[0] == ["id", "kind", "version", "size", "formats", "served"]
    assert [lines[1][i] for i in (0, 1, 3, 4, 5, 6, 7)] == ["tiny", "llm", "3", "MB", "bf16,", "int4", "-"]
    assert lines[2][:2] == ["tiny:mine", "adapter"]


def test_list_tells_what_is_served_graphs_among_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, store.parent, "tiny", "rag")
    code, text = _run("list", "--json")
    rows = {row["id"]: (row["kind"], row["served"]) for row in json.loads(text)}
    assert code == 0 and rows["tiny"] == ("llm", True) and rows["tiny:mine"] == ("adapter", False)
    assert rows["rag"] == ("graph", True)


def test_show_tells_the_manifest_and_whether_it_still_holds(store: Path) -> None:
    code, text = _run("show", "tiny")
    assert code == 0 and "tiny:mine" in text and text.endswith("hold\n")
    (store / "tiny" / "model.safetensors").write_bytes(b"x")
    code, text = _run("show", "tiny", "--json")
    document = json.loads(text)
    assert code == 1 and document["verified"] is False and "checksum mismatch" in document["problem"]
    assert _run("show", "tiny", "--no-verify")[0] == 0


def test_remove_refuses_what_is_served_or_stood_upon_unless_it_is_forced(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("remove", "tiny")[0] == 1 and "tiny:mine" in capsys.readouterr().err
    _serve(monkeypatch, store.parent, "tiny")
    assert _run("remove", "tiny")[0] == 1 and "is served now" in capsys.readouterr().err
    assert (store / "tiny").exists()
    assert _run("remove", "tiny", "--force") == (0, "tiny is removed\n")
    assert not (store / "tiny").exists()
    assert _run("remove", "tiny", "--force")[0] == 1 and "there is no 'tiny'" in capsys.readouterr().err


def test_add_refuses_in_one_line_what_is_nothing(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("add", "no such thing")[0] == 1
    assert capsys.readouterr().err.startswith("failed: there is no 'no such thing'")


def test_a_hub_is_asked_although_libraries_are_told_to_stay_offline(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert _run("add", "org/model")[0] == 1
    assert "http://127.0.0.1:1 cannot be reached" in capsys.readouterr().err


def test_a_measurement_that_fails_is_said_and_the_model_stays(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(measures.MeasureFailed, match="torch bf16"):
        measures.measure(store / "tiny", "torch", "bf16")
    models._print_measured({"failed": "torch bf16: why"})
    assert capsys.readouterr().out == "not measured: torch bf16: why\n"


def test_before_and_after_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    before = {
        "size_bytes": 269e6,
        "rss_bytes": 600e6,
        "load_s": 2.0,
        "prefill_tokens_per_s": 200.0,
        "decode_tokens_per_s": 25.0,
        "perplexity": 27.6,
        "tokens": 2319,
        "text": "measure_text.txt",
        "weights": "bf16",
        "engine": "torch",
    }
    after = before | {"size_bytes": 96.6e6, "perplexity": 27.8, "weights": "int4", "engine": "native"}
    models._print_measured({"before": before, "after": after})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["weights,", "MB", "269", "97", "0.359x"]
    assert lines[6].split() == ["perplexity", "27.600", "27.800", "1.007x"]
    assert "2319 tokens of measure_text.txt" in lines[7]


def test_the_commands_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from devstack.cli import app; sys.exit(bool({'numpy', 'torch', 'modelstore'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
