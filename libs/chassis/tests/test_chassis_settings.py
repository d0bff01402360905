from pathlib import Path

import pytest
from pydantic import SecretStr

from chassis.settings import EXIT_BAD_CONFIGURATION, ServiceSettings, load_settings, settings_config


class _Settings(ServiceSettings):
    model_config = settings_config("SMOKE_")
    pepper: SecretStr


@pytest.fixture
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"GRPC_PORT": "9000", "HTTP_PORT": "9001", "PEPPER": "hush", "TRACE_DIR": "/t"}.items():
        monkeypatch.setenv(f"SMOKE_{name}", value)


@pytest.mark.usefixtures("_environment")
def test_settings_are_read_with_the_prefix_and_frozen() -> None:
    settings = load_settings(_Settings)
    assert settings.grpc_port == 9000 and settings.trace_dir == Path("/t")
    with pytest.raises(ValueError):
        settings.grpc_port = 1  # type: ignore[misc]


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize(("name", "value"), [("GRPC_PORT", "eighty"), ("HTTP_PORT", "70000"), ("LOG_LEVEL", "LOUD")])
def test_bad_configuration_exits_and_names_the_field(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(f"SMOKE_{name}", value)
    with pytest.raises(SystemExit) as exit_info:
        load_settings(_Settings)
    assert exit_info.value.code == EXIT_BAD_CONFIGURATION
    printed = capsys.readouterr().err
    assert f"SMOKE_{name}" in printed and "hush" not in printed


@pytest.mark.usefixtures("_environment")
def test_a_secret_without_a_value_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SMOKE_PEPPER")
    with pytest.raises(SystemExit):
        load_settings(_Settings)
    assert "SMOKE_PEPPER" in capsys.readouterr().err
