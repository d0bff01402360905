"""What the gateway is told by its environment, with the prefix GATEWAY_."""

from pathlib import Path

from pydantic import Field, SecretStr

from chassis.settings import ServiceSettings, settings_config

_ADDRESS = r"^[^\s:/]+:\d{1,5}$"
_GRAPHS_DIR = Path(__file__).with_name("graphs")


class GatewaySettings(ServiceSettings):
    """Settings of the gateway."""

    model_config = settings_config("GATEWAY_")

    embedder_addr: str = Field(pattern=_ADDRESS, description="host:port of the embedder's gRPC server.")
    retriever_addr: str = Field(pattern=_ADDRESS, description="host:port of the retriever's gRPC server.")
    generator_addr: str = Field(pattern=_ADDRESS, description="host:port of the generator's gRPC server.")
    monitor_addr: str = Field(pattern=_ADDRESS, description="host:port of the monitor's gRPC server.")
    trainer_addr: str = Field(pattern=_ADDRESS, description="host:port of the trainer's gRPC server.")
    evaluator_addr: str = Field(pattern=_ADDRESS, description="host:port of the evaluator's gRPC server.")
    valkey_url: SecretStr = Field(description="redis:// URL of the rate-limit counters, with the password in it.")
    data_dir: Path = Field(description="Folder of the database and of uploaded files.")
    key_pepper: SecretStr = Field(min_length=16, description="Secret that access keys are hashed with.")
    bootstrap_api_key: SecretStr | None = Field(
        None, description="Full key, sk-<id>-<secret>, made at the start: tenant default, no request limit."
    )
    bootstrap_admin_key: SecretStr | None = Field(None, description="Full key of an admin, made at the start.")
    graphs_dir: Path = Field(_GRAPHS_DIR, description="Folder with the declarations of the graphs (*.yaml).")
    request_timeout_s: float = Field(300.0, gt=0, le=3600, description="Most seconds that one request may take.")
    max_body_bytes: int = Field(2 * 1024**2, ge=1024, description="Largest JSON body, in bytes.")
    max_upload_bytes: int = Field(64 * 1024**2, ge=1024, description="Largest uploaded file, in bytes.")
    max_tenant_upload_bytes: int = Field(
        4 * 1024**3, ge=1024, description="Most bytes that one tenant may keep in /v1/files."
    )
    max_batch_lines_in_flight: int = Field(
        4, ge=1, le=256, description="Most lines of batches that are being answered at a time, all batches together."
    )
    public_grpc_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port of the gRPC services for clients outside, which check keys; grpc_port is for our services.",
    )
