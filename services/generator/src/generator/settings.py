"""What the generator is told by its environment, with the prefix GENERATOR_."""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from chassis.settings import ServiceSettings, settings_config


class GeneratorSettings(ServiceSettings):
    """Settings of the generator."""

    model_config = settings_config("GENERATOR_")

    model_dir: Path = Field(description="Folder of the model in the model store, with its manifest.json.")
    store_dir: Path | None = Field(None, description="Model store that adapters lie in; without it none can be loaded.")
    max_adapters: int = Field(32, ge=0, le=1024, description="Most adapters that are loaded at once.")
    adapter_memory_mb: int = Field(512, ge=1, le=65536, description="Memory for their weights, in MiB.")
    instance: str = Field(
        "0", pattern=r"^[A-Za-z0-9_-]{1,32}$", description="Name of this replica, kept across restarts."
    )
    engine: Literal["auto", "native", "torch", "vllm", "toy"] = Field(
        "auto",
        description="What computes: native (our kernels on a CPU), torch (the reference, and for a GPU), vllm (a vLLM "
        "server does it) or toy (no weights at all); auto: native where it can run the model, else torch.",
    )
    weights: Literal["auto", "int4", "int8"] = Field(
        "auto", description="Packed weights of the engine native; auto: the smallest that the model has."
    )
    activations: Literal["int8", "mixed", "int16"] = Field(
        "mixed", description="Precision of what the weights of the engine native meet: speed against exactness."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Of the engine torch; auto: a GPU if it has one."
    )
    vllm_url: str = Field(
        "", validate_default=True, description="Base URL of the vLLM server (http://host:8000), for the engine vllm."
    )
    vllm_api_key: SecretStr | None = Field(None, description="What vLLM was given as --api-key.")
    vllm_model: str = Field("", description="Name that vLLM serves the model under; by default the one that it serves.")
    vllm_adapter_dir: Path | None = Field(
        None, description="Folder that vLLM sees at the same path, to hand it adapters; without it there are none."
    )
    vllm_silence_s: float = Field(
        120.0, ge=1, le=3600, description="Seconds without a word on a stream of vLLM until it counts as broken."
    )
    num_threads: int = Field(2, ge=1, le=256, description="Threads that one step is computed with.")
    dtype: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 where the processor has it.")
    max_model_len: int = Field(2048, ge=128, le=1_048_576, description="Most tokens of prompt and completion together.")
    kv_cache_mb: int = Field(256, ge=8, le=1_048_576, description="Memory for keys and values, in MiB.")
    block_size: int = Field(16, ge=1, le=256, description="Tokens in one block of that memory.")
    prefix_caching: bool = Field(
        True, description="Whether prompts with a common beginning share its keys and values, within a tenant."
    )
    max_running: int = Field(32, ge=1, le=1024, description="Most sequences in one batch.")
    max_waiting: int = Field(256, ge=16, le=65536, description="Sequences that may wait; more are refused.")
    # A cancel waits for the step that runs. 128 tokens are as fast for each token as 512, and take 0.2 s on two cores.
    max_step_tokens: int = Field(128, ge=16, le=65536, description="Most tokens in one step, the background's aside.")
    max_mixed_prefill_tokens: int = Field(
        256, ge=1, le=65536, description="Most prompt tokens in a step that others decode in; longer prompts are paced."
    )
    grammar_timeout_s: float = Field(
        0.7, gt=0, le=60, description="Longest time that a grammar may take to compile, in seconds."
    )
    grammar_cache_size: int = Field(128, ge=1, le=65536, description="Compiled grammars that are kept.")
    # Less spares running streams and makes long prompts wait for longer; the README has the figures.
    max_slowdown: float = Field(
        1.8, ge=1, le=1000, description="How many times as long a step may take with a piece of a long prompt."
    )
    speculation: bool = Field(True, description="Whether repeated text is guessed from prompt and completion.")
    max_drafts: int = Field(4, ge=1, le=32, description="Most tokens guessed for one sequence and step.")
    max_speculative_batch: int = Field(4, ge=1, le=1024, description="Most decoding sequences beside which it guesses.")
    max_background_tokens: int = Field(
        8, ge=1, le=65536, description="Most tokens of the background (priority below 0) in a step with others."
    )

    @field_validator("vllm_url")
    @classmethod
    def _is_there_for_vllm(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("engine") == "vllm" and not value.startswith(("http://", "https://")):
            raise ValueError("the engine vllm needs the URL of a vLLM server")
        return value
