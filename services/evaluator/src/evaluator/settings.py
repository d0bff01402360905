"""What the evaluator is told by its environment, with the prefix EVALUATOR_."""

from pathlib import Path

from pydantic import Field

from chassis.settings import ServiceSettings, settings_config


class EvaluatorSettings(ServiceSettings):
    """Settings of the evaluator."""

    model_config = settings_config("EVALUATOR_")

    gateway_addr: str = Field(pattern=r"^\S+:\d+$", description="host:port of the gateway's gRPC server.")
    generator_addr: str = Field(pattern=r"^\S+:\d+$", description="host:port of the generator's gRPC server.")
    data_dir: Path = Field(description="Folder of answers of running jobs and of results.")
    tasks_dir: Path | None = Field(None, description="Folder of further task files; none for the shipped ones alone.")
    # One: each question more in the batch makes every token of a chat that runs beside it slower.
    concurrency: int = Field(1, ge=1, le=32, description="Questions that are asked at once.")
    answer_timeout_s: float = Field(180.0, gt=0, le=3600, description="Seconds that one answer may take.")
    prediction_timeout_s: float = Field(180.0, gt=0, le=3600, description="Seconds that one call for a text may take.")
    file_timeout_s: float = Field(60.0, gt=0, le=600, description="Seconds that reading a task file may take.")
    patience_s: float = Field(
        30.0, ge=0, le=300, description="Seconds that one attempt waits for a service that is away."
    )
    score_timeout_s: float = Field(300.0, ge=1, le=3600, description="Seconds of CPU time that scoring may take.")
    max_task_bytes: int = Field(1024**2, ge=1024, le=16 * 1024**2, description="Bytes of the largest task file.")
    max_results: int = Field(1000, ge=1, le=100_000, description="Results that are kept; the oldest make room.")
