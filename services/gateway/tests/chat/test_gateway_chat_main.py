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


OIDC = {
    "OIDC_ISSUER": "https://id.example.com/",
    "OIDC_AUDIENCE": "pressroom",
    "OIDC_JWKS_URL": "https://id.example.com/keys",
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"OIDC_ISSUER": None}, "OIDC_ISSUER"),
        ({"OIDC_AUDIENCE": None}, "OIDC_ISSUER"),
        ({"OIDC_JWKS_URL": None}, "OIDC_ISSUER"),
        ({"OIDC_JWKS_FILE": "/nonexistent/jwks.json"}, "OIDC_ISSUER"),  # a file and a URL
        ({"OIDC_JWKS_URL": "http://id.example.com/keys"}, "OIDC_JWKS_URL"),  # anybody between could forge the keys
        ({"OIDC_JWKS_URL": "file:///etc/passwd"}, "OIDC_JWKS_URL"),
        ({"OIDC_JWKS_URL": "http://localhost.example.com/keys"}, "OIDC_JWKS_URL"),
        ({"OIDC_JWKS_URL": "http://localhost:80@id.example.com/keys"}, "OIDC_JWKS_URL"),
    ],
)
def test_half_a_trust_in_tokens_is_refused(monkeypatch, capsys, changes, named):
    for name, value in (OIDC | changes).items():
        if value is not None:
            monkeypatch.setenv(f"GATEWAY_{name}", value)
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 78 and f"GATEWAY_{named}: " in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"{", b'{"keys": []}'])
def test_a_file_without_the_issuers_keys_is_refused(monkeypatch, capsys, tmp_path, content):
    path = tmp_path / "jwks.json"
    if content is not None:
        path.write_bytes(content)
    for name, value in (OIDC | {"OIDC_JWKS_FILE": str(path)}).items():
        if name != "OIDC_JWKS_URL":
            monkeypatch.setenv(f"GATEWAY_{name}", value)
    assert main.main() == 78
    assert "GATEWAY_OIDC_JWKS_FILE: " in capsys.readouterr().err
