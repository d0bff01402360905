"""Settings that every service has, and loading that says which field is wrong and how to mend it."""

import sys
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

EXIT_BAD_CONFIGURATION = 78  # EX_CONFIG of sysexits.h


def settings_config(prefix: str) -> SettingsConfigDict:
    """Returns the configuration of a settings class whose fields are read from the environment with a prefix."""
    return SettingsConfigDict(env_prefix=prefix, frozen=True, extra="ignore", hide_input_in_errors=True)


class ServiceSettings(BaseSettings):
    """What every service is told. A service's own class adds its fields and a prefix."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    grpc_port: int = Field(ge=1, le=65535, description="TCP port of the gRPC server.")
    http_port: int = Field(ge=1, le=65535, description="TCP port of /healthz, /readyz and /metrics.")
    nats_url: str = Field("nats://127.0.0.1:4222", description="URL of the bus, with user and password where it asks.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level that is logged.")
    log_format: Literal["json", "text", "auto"] = Field("auto", description="auto: text on a terminal, JSON elsewhere.")
    trace_dir: Path | None = Field(None, description="Folder of the local span store; none keeps no spans.")
    otlp_endpoint: str | None = Field(None, description="OTLP gRPC endpoint of a collector; takes trace_dir's place.")
    max_connection_age_s: float | None = Field(
        None, ge=1, le=86_400, description="Seconds until a gRPC client must connect anew and finds new replicas."
    )
    shutdown_grace_s: float = Field(10.0, gt=0, le=600, description="Seconds that running requests get after SIGTERM.")


SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


def load_settings(settings_class: type[SettingsT]) -> SettingsT:
    """Reads the settings from the environment; on a bad one prints each field with its fix and exits with 78."""
    try:
        return settings_class()
    except ValidationError as error:
        _exit_with(settings_class, error)


def _exit_with(settings_class: type[ServiceSettings], error: ValidationError) -> NoReturn:
    prefix = settings_class.model_config.get("env_prefix", "")
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else ""
        field = settings_class.model_fields.get(name)
        meaning = f" ({field.description})" if field is not None and field.description else ""
        print(
            f"bad configuration: {prefix}{name.upper()}: {problem['msg']}. Set it in the environment{meaning}",
            file=sys.stderr,
        )
    sys.exit(EXIT_BAD_CONFIGURATION)
