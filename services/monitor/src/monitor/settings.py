"""What the monitor is told by its environment, with the prefix MONITOR_."""

from pathlib import Path

from pydantic import Field

from chassis.settings import ServiceSettings, settings_config


class MonitorSettings(ServiceSettings):
    """Settings of the monitor."""

    model_config = settings_config("MONITOR_")

    data_dir: Path = Field(description="Folder of the samples that wait and of the profiles; made where it is missing.")
    encoder_dir: Path = Field(description="Folder of all-minilm-l6-v2 in the model store, for similarities.")
    sample_rate: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the records whose text is profiled. A record takes 20 to 250 ms of one core, at the "
        "lowest priority: lower it where more come than that leaves time for. 0 profiles nothing.",
    )
    max_waiting: int = Field(
        2_000, ge=1, le=50_000, description="Most samples that wait on disk; what comes beyond is left out and counted."
    )
    max_text_chars: int = Field(
        2_000,
        ge=100,
        le=20_000,
        description="Characters of each prompt and each response that are profiled: the first and the last half of a "
        "longer one. Time grows with it, in places with its square.",
    )
    window_s: int = Field(300, ge=10, le=86_400, description="Length of a profile's window of time, in seconds.")
    num_windows: int = Field(288, ge=1, le=10_000, description="Windows back from now that are kept, for each model.")
    profiler_idle_s: float = Field(
        300.0,
        gt=0,
        le=86_400,
        description="Seconds without a sample after which the profiler's process (about 300 MB) is ended.",
    )
    text_cpu_limit_s: float = Field(
        30.0, gt=0, le=600, description="Processor seconds for one record after which the profiler's process is ended."
    )
