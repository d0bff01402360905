"""Bad configuration ends the process before a port opens, and says what to mend."""

import pytest

from gateway import main

ENVIRONMENT = {
    "GRPC_PORT": "1",
    "HTTP_PORT": "1",
    "EMBEDDER_ADDR": "127.0.0.1:2",
    "RETRIEVER_ADDR": "127.0.0.1:2",
    "GENERATOR_ADDR": "127.0.0.1:2",
    "MONITOR_ADDR": "127.0.0.1:2",
    "TRAINER_ADDR": "127.0.0.1:2",
    "EVALUATOR_ADDR": "127.0.0.1:2",
    "VALKEY_URL": "redis://127.0.0.1:2/0",
    "DATA_DIR": "/nonexistent",
    "KEY_PEPPER": "p" * 32,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(f"GATEWAY_{name}", value)

    def opened(*_):
        raise AssertionError("the process went on")

    monkeypatch.setattr(main.App, "run", opened)


def test_a_bad_graph_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "odd.yaml").write_text("name: odd\nblock: ensemble\nnodes: []\n")
    monkeypatch.setenv("GATEWAY_GRAPHS_DIR", str(tmp_path))
    assert main.main() == 78
    said = capsys.readouterr().err
    assert "odd.yaml: block: the building block 'ensemble'" in said and "GATEWAY_GRAPHS_DIR" in said


@pytest.mark.parametrize(("name", "value"), [("KEY_PEPPER", "short"), ("EMBEDDER_ADDR", "nowhere"), ("HTTP_PORT", "x")])
def test_a_bad_setting_is_named_and_a_secret_is_not_told(monkeypatch, capsys, name, value):
    monkeypatch.setenv(f"GATEWAY_{name}", value)
    with pytest.raises(SystemExit) as caught:
        main.main()
    said = capsys.readouterr().err
    assert caught.value.code == 78 and f"GATEWAY_{name}" in said and "short" not in said
