"""What the trainer is told by its environment, with the prefix TRAINER_."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from chassis.settings import ServiceSettings, settings_config


class TrainerSettings(ServiceSettings):
    """Settings of the trainer."""

    model_config = settings_config("TRAINER_")

    generator_addr: str = Field(pattern=r"^\S+:\d+$", description="host:port of the generator's gRPC server.")
    gateway_addr: str = Field(pattern=r"^\S+:\d+$", description="host:port of the gateway's gRPC server.")
    data_dir: Path = Field(description="Folder of runs, checkpoints and the default MLflow database.")
    store_dir: Path = Field(description="Model store: bases are read from it, adapters are published into it.")

    num_threads: int = Field(
        default_factory=lambda: min(len(os.sched_getaffinity(0)), 16),
        ge=1,
        le=256,
        description="Threads that one training step is computed with; all cores, at low priority, where it is not set.",
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Of the base while training; auto: bf16 where the processor has it. Adapters are fp32."
    )
    checkpoint_interval_s: float = Field(
        15.0, ge=0, le=3600, description="Seconds between checkpoints; a crash costs at most so much work."
    )
    max_file_bytes: int = Field(16 * 1024**2, ge=1024, le=2**30, description="Bytes of the largest training file.")
    max_examples: int = Field(10_000, ge=1, le=1_000_000, description="Most examples in a training file.")
    # As much as the generator serves by default: beyond that nobody could ask what was learned.
    max_example_tokens: int = Field(
        2048, ge=16, le=1_048_576, description="Most tokens of one example; the base's context caps it."
    )
    file_timeout_s: float = Field(60.0, gt=0, le=600, description="Seconds that reading one file may take.")
    file_patience_s: float = Field(30.0, ge=0, le=600, description="Seconds that one attempt waits for the gateway.")
    load_timeout_s: float = Field(60.0, gt=0, le=600, description="Seconds that the generator may take to load.")
    acknowledge_patience_s: float = Field(
        120.0, ge=0, le=3600, description="Seconds to wait for a generator that is away, before a job ends without it."
    )
    max_runs: int = Field(200, ge=1, le=100_000, description="Ended runs whose history is kept.")
    tracking_uri: str = Field(
        "", description='MLflow\'s tracking URI; empty for a SQLite file in data_dir, "none" for no tracking.'
    )
    experiment: str = Field("pressroom-finetuning", min_length=1, max_length=200, description="MLflow's experiment.")
    tracker_patience_s: float = Field(
        30.0, ge=0, le=600, description="Seconds that the end of a job waits for the tracker to have all of it."
    )
