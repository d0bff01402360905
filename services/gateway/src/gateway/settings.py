"""What the gateway is told by its environment, with the prefix GATEWAY_."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from chassis.settings import ServiceSettings, settings_config

_ADDRESS = r"^[^\s:/]+:\d{1,5}$"
_JWKS_URL = r"^(https://|http://(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?/)"
_ADDRESSES = r"^[^\s:/,]+:\d{1,5}(,[^\s:/,]+:\d{1,5})*$"
_GRAPHS_DIR = Path(__file__).with_name("graphs")


class GatewaySettings(ServiceSettings):
    """Settings of the gateway."""

    model_config = settings_config("GATEWAY_")

    embedder_addr: str = Field(pattern=_ADDRESS, description="host:port of the embedder's gRPC server.")
    retriever_addr: str = Field(pattern=_ADDRESS, description="host:port of the retriever's gRPC server.")
    generator_addr: str = Field(
        pattern=_ADDRESSES,
        description="host:port of the generator's gRPC server; several, with commas, are replicas that are left alone "
        "one by one while they fail.",
    )
    monitor_addr: str = Field(pattern=_ADDRESS, description="host:port of the monitor's gRPC server.")
    trainer_addr: str = Field(pattern=_ADDRESS, description="host:port of the trainer's gRPC server.")
    evaluator_addr: str = Field(pattern=_ADDRESS, description="host:port of the evaluator's gRPC server.")
    valkey_url: SecretStr = Field(description="redis:// URL of Valkey (limits, exact cache), with the password in it.")
    local_limit_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Part of each limit that this process lets through while Valkey is away: 1 over the replicas.",
    )
    data_dir: Path = Field(description="Folder of the database and of uploaded files.")
    key_pepper: SecretStr = Field(min_length=16, description="Secret that access keys are hashed with.")
    bootstrap_api_key: SecretStr | None = Field(
        None, description="Full key, sk-<id>-<secret>, made at the start: tenant default, no request limit."
    )
    bootstrap_admin_key: SecretStr | None = Field(None, description="Full key of an admin, made at the start.")
    cache_ttl_s: float = Field(
        3600.0, ge=1, le=7 * 86_400, description="Seconds for which an answer stays in the exact cache."
    )
    graphs_dir: Path = Field(_GRAPHS_DIR, description="Folder with the declarations of the graphs (*.yaml).")
    upstream_keys: Annotated[dict[str, SecretStr], NoDecode] = Field(
        default_factory=dict, description='JSON object with the keys of upstreams: {"<name in the graphs>": "<key>"}.'
    )
    request_timeout_s: float = Field(300.0, gt=0, le=3600, description="Most seconds that one request may take.")
    max_running: int = Field(
        32,
        ge=1,
        le=4096,
        description="Sequences that the generator is given at once, to begin with: as many as fit into its batch.",
    )
    most_running: int = Field(
        256, ge=1, le=4096, description="Sequences that it is given at most, where it begins with all at once."
    )
    max_waiting: int = Field(
        512, ge=1, le=65536, description="Requests that may wait for their turn, for each backend; more are refused."
    )
    max_wait_s: float = Field(
        120.0,
        gt=0,
        le=3600,
        description="Longest wait for a turn, in seconds; who would wait longer is refused at once.",
    )
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
    oidc_audience: str | None = Field(None, min_length=1, description="The aud that tokens (JWT) must have.")
    oidc_jwks_file: Path | None = Field(None, description="File with the issuer's public keys (JWKS).")
    oidc_jwks_url: str | None = Field(
        None, pattern=_JWKS_URL, description="URL of the issuer's public keys: https, or http on this machine."
    )
    oidc_tenant_claim: str = Field("tenant", min_length=1, description="Claim of a token that names its tenant.")
    oidc_scopes_claim: str | None = Field(
        None, min_length=1, description="Claim that lists a token's scopes; without it the tenant's hold."
    )
    oidc_models_claim: str | None = Field(
        None, min_length=1, description="Claim that lists a token's models; without it the tenant's hold."
    )
    # The last of them: its check sees the others.
    oidc_issuer: str | None = Field(
        None,
        min_length=1,
        validate_default=True,
        description="The iss that tokens must have; without it none are taken.",
    )

    @field_validator("oidc_issuer")
    @classmethod
    def _is_complete(cls, issuer: str | None, info: ValidationInfo) -> str | None:
        audience, file, url = (info.data.get(f"oidc_{name}") for name in ("audience", "jwks_file", "jwks_url"))
        if issuer is None and (audience or file or url):
            raise ValueError("GATEWAY_OIDC_ settings are there, and this one is not")
        if issuer is not None and (not audience or (file is None) == (url is None)):
            raise ValueError("needs GATEWAY_OIDC_AUDIENCE, and GATEWAY_OIDC_JWKS_FILE or GATEWAY_OIDC_JWKS_URL")
        return issuer

    @field_validator("upstream_keys", mode="before")
    @classmethod
    def _parsed(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError("is no JSON object") from None  # the parser's own error would hold the text
