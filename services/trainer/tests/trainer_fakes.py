"""Stand-ins for what a finetune needs of the world; folders are real ones."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chassis.bus import Bus
from chassis.errors import Code, PlatformError
from chassis.jobs import Cancellations
from contracts.jobs import decode_cancel
from testkit import eventually
from trainer.api.consumers import TrainWorker
from trainer.backends import run_files
from trainer.backends.adapter_store import AdapterStore
from trainer.backends.bus_events import BusAnnouncer
from trainer.backends.run_folders import DirectoryRuns
from trainer.core.finetune import FinetunePolicy, Finetuner
from trainer.core.ports import RunFolder
from trainer.core.runs import Adapter, Step

PLAN = {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 1.0, "num_examples": 6, "seed": 7}
NUM_STEPS = 4


@dataclass
class FakeEnd:
    """How a fake child ended."""

    status: int = 0
    last_words: str = ""


class FakeFiles:
    """Uploads by id."""

    def __init__(self) -> None:
        self.files = {"file-1": b"{}\n"}
        self.is_away = False

    async def read(self, file_id: str, sha256: str) -> bytes:
        if self.is_away:
            raise PlatformError(Code.UNAVAILABLE, "gateway is not available")
        if file_id not in self.files:
            raise PlatformError(Code.NOT_FOUND, "no such file", param="training_file")
        return self.files[file_id]


class FakeTrainings:
    """Trains four steps, each as long as `pause_s`; `ends` says, child by child, at which step one dies and how."""

    def __init__(self) -> None:
        self.pause_s = 0.0
        self.deaths: list[tuple[int, FakeEnd]] = []
        self.refusal: dict[str, Any] | None = None
        self.num_children = 0
        self.num_running = 0
        self.most_running = 0

    async def run(self, folder: RunFolder, on_message: Callable[[Mapping[str, Any]], Awaitable[None]]) -> FakeEnd:
        self.num_children += 1
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            return await self._run(folder, on_message)
        finally:
            self.num_running -= 1

    async def _run(self, folder: RunFolder, tell: Callable[[Mapping[str, Any]], Awaitable[None]]) -> FakeEnd:
        if self.refusal is not None:
            await tell(self.refusal)
            return FakeEnd(3)
        death_step, death = self.deaths.pop(0) if self.deaths else (-1, FakeEnd())
        await tell({"kind": "planned", "plan": PLAN, "total_steps": NUM_STEPS, "num_examples": 6, "num_tokens": 60})
        with run_files.StepsFile(folder.path) as steps:
            done = len(folder.steps())  # as if every step had a checkpoint
            await tell({"kind": "resumed", "step": done})
            for step in range(done + 1, NUM_STEPS + 1):
                if step - 1 == death_step:
                    return death
                await asyncio.sleep(self.pause_s)
                steps.append(Step(step, 1.0 / step, 30, 1e-3, 1_000 + step))
                await tell({"kind": "step", "step": step, "loss": 1.0 / step})
        adapter = folder.path / run_files.ADAPTER
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "adapter_model.safetensors").write_bytes(b"weights")
        await tell(
            {
                "kind": "made",
                "rank": 8,
                "alpha": 16,
                "target_modules": ["q_proj"],
                "base_version": "0123456789ab",
                "base_weights_sha256": "ab" * 32,
            }
        )
        return FakeEnd()


class FakeServing:
    """The engine: `problem` is raised by the next loads, `pause_s` is how long one takes."""

    def __init__(self) -> None:
        self.loaded: dict[str, Adapter] = {}
        self.problem: PlatformError | None = None
        self.pause_s = 0.0
        self.num_loads = 0

    async def load(self, adapter: Adapter) -> None:
        self.num_loads += 1
        await asyncio.sleep(self.pause_s)
        if self.problem is not None:
            raise self.problem
        self.loaded[adapter.id] = adapter

    async def unload(self, adapter_id: str) -> None:
        self.loaded.pop(adapter_id, None)


class FakeTracker:
    """Follows until the run has ended."""

    def __init__(self) -> None:
        self.num_followed = 0

    async def follow(self, folder: RunFolder) -> None:
        def has_ended() -> bool:
            return bool(json.loads((folder.path / run_files.RUN).read_text())["status"] != "running")

        await eventually(has_ended, timeout_s=30)
        self.num_followed += 1


@dataclass
class Workshop:
    """A worker with all of these around it."""

    folder: Path
    bus: Bus
    files: FakeFiles = field(default_factory=FakeFiles)
    trainings: FakeTrainings = field(default_factory=FakeTrainings)
    serving: FakeServing = field(default_factory=FakeServing)
    tracker: FakeTracker = field(default_factory=FakeTracker)
    cancellations: Cancellations = field(default_factory=lambda: Cancellations(decode_cancel))
    acknowledge_patience_s: float = 0.3

    def __post_init__(self) -> None:
        self.runs = DirectoryRuns(self.folder / "runs", max_runs=3)
        self.store = self.folder / "store"
        self.adapters = AdapterStore(self.store)
        self.worker = self.make_worker()

    def make_worker(self) -> TrainWorker:
        """Another one over the same folders, as after a restart."""
        policy = FinetunePolicy(
            child={},
            file_patience_s=0.0,
            acknowledge_patience_s=self.acknowledge_patience_s,
            tracker_patience_s=2.0,
            restart_pause_s=0.01,
        )
        finetuner = Finetuner(
            self.files,
            self.runs,
            self.trainings,
            self.adapters,
            BusAnnouncer(self.bus),
            self.serving,
            self.tracker,
            policy,
        )
        return TrainWorker(self.bus, finetuner, self.cancellations)

    def published(self) -> list[str]:
        """Everything that lies among the store's adapters, half-made things as well."""
        folder = self.store / "adapters"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
