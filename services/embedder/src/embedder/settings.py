"""What the embedder is told by its environment, with the prefix EMBEDDER_."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from chassis.settings import ServiceSettings, settings_config


class EmbedderSettings(ServiceSettings):
    """Settings of the embedder."""

    model_config = settings_config("EMBEDDER_")

    model_dir: Path = Field(description="Folder of the encoder in the model store, with its manifest.json.")
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="What the encoder runs on; cuda needs onnxruntime-gpu, as the image's GPU variant has it."
    )
    num_threads: int = Field(1, ge=1, le=64, description="Threads that one batch is computed with.")
    max_batch_texts: int = Field(32, ge=1, le=512, description="Most texts in one batch.")
    max_batch_tokens: int = Field(4096, ge=256, description="Most tokens in one batch, padding included.")
    batch_window_ms: float = Field(2.0, ge=0, le=100, description="Milliseconds that a busy queue gathers a batch.")
    max_queued_texts: int = Field(4096, ge=1, description="Texts that may wait; more are refused with OVERLOADED.")
