"""Runs an order: read the file, train in a child, publish the adapter, have the engine acknowledge it.

Can be killed anywhere and run again. Knows nothing of the bus, of processes or of torch.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from chassis.errors import Code, PlatformError
from chassis.patience import is_transient, patiently
from trainer.core.journal import Journal
from trainer.core.ports import (
    Adapters,
    Announcer,
    ChildMessage,
    Files,
    RunFolders,
    Serving,
    Tracker,
    Trainings,
    Watcher,
)
from trainer.core.runs import Adapter, RunStatus, TrainOrder, check_order
from trainer.core.space import no_space, no_space_reason

log = logging.getLogger(__name__)

T = TypeVar("T")
_CHECK_S = 0.25
_RESTART_PAUSE_S = 1.0
_MAX_DEATHS = 2  # at one step: what fails twice in the same place will fail again
# Somebody's kill -9 says nothing about the work; the system's for want of memory looks the same, and comes back.
_MAX_KILLS = 4


@dataclass(frozen=True, slots=True)
class FinetunePolicy:
    """Bounds. `child`: what every child is told beside the order."""

    child: Mapping[str, Any]
    file_patience_s: float
    acknowledge_patience_s: float
    tracker_patience_s: float
    restart_pause_s: float = _RESTART_PAUSE_S


class AlreadyEnded(Exception):
    """An earlier attempt has ended the job, but could not say so."""

    def __init__(self, status: RunStatus, error: str) -> None:
        super().__init__(error)
        self.status = status
        self.error = error


class Finetuner:
    """Runs orders, one at a time."""

    def __init__(
        self,
        files: Files,
        runs: RunFolders,
        trainings: Trainings,
        adapters: Adapters,
        announcer: Announcer,
        serving: Serving,
        tracker: Tracker,
        policy: FinetunePolicy,
    ) -> None:
        self._files = files
        self._runs = runs
        self._trainings = trainings
        self._adapters = adapters
        self._announcer = announcer
        self._serving = serving
        self._tracker = tracker
        self._policy = policy
        self._tracking: asyncio.Task[None] | None = None

    async def run(self, order: TrainOrder, watcher: Watcher) -> Adapter:
        """Returns the adapter once it is published and the engine has answered through it, or stayed away for long.

        Raises PlatformError: transient where it may be run again, else what is wrong; AlreadyEnded; and what
        `watcher.check` raises. `finish` is to be called for each end, and `leave` where there is none yet.
        """
        check_order(order)
        watcher.check()
        try:
            run, folder = await _whole(self._runs.begin, order)
            if run.status in (RunStatus.FAILED, RunStatus.CANCELLED):
                raise AlreadyEnded(run.status, run.error)
            journal = Journal(run, folder)
            self._track(journal)
            return await _stoppable(self._attempt(order, journal, watcher), watcher.check)
        except OSError as error:
            if (why := no_space_reason(error)) is None:
                raise
            raise no_space(why) from error

    async def leave(self) -> None:
        """Lets go of an attempt that will be made again."""
        if self._tracking is not None:
            self._tracking.cancel()
            await asyncio.wait({self._tracking})
            self._tracking = None

    async def finish(self, order: TrainOrder, status: RunStatus, error: str = "") -> None:
        """Leaves everything as a job's end should: nothing published but of a success, nothing but the history kept."""
        try:
            check_order(order)
        except PlatformError:  # its names are none, so nothing was made under them
            return
        if status is not RunStatus.SUCCEEDED:
            await self._withdraw(order)
        try:
            await _whole(self._close, order, status, error)
        except OSError as problem:  # the disk may be full: the client is told all the same
            log.error("the end of a run was not kept", extra={"job_id": order.job_id, "error": repr(problem)})
        if self._tracking is not None:
            await asyncio.wait({self._tracking}, timeout=self._policy.tracker_patience_s)
        await self.leave()

    def _close(self, order: TrainOrder, status: RunStatus, error: str) -> None:
        run, folder = self._runs.begin(order)
        folder.prune()  # first: it makes the room that the rest needs
        journal = Journal(run, folder)
        journal.ended(status, error)
        self._runs.prune()

    async def _withdraw(self, order: TrainOrder) -> None:
        """Takes back what was published, if anything was."""
        try:
            adapter = await _whole(self._adapters.find, order)
            if adapter is not None:
                with contextlib.suppress(PlatformError):  # away or never loaded: it finds none when it starts
                    await self._serving.unload(adapter.id)
            await _whole(self._adapters.remove, order.job_id)
        except OSError as error:
            log.error("an adapter was left behind", extra={"job_id": order.job_id, "error": repr(error)})

    def _track(self, journal: Journal) -> None:
        self._tracking = asyncio.create_task(self._tracker.follow(journal.folder), name="tracker")

    async def _attempt(self, order: TrainOrder, journal: Journal, watcher: Watcher) -> Adapter:
        adapter = await _whole(self._adapters.find, order)
        if adapter is None:
            training = _Training(order, journal, watcher)
            await self._train(training)
            made = await _whole(training.result)
            adapter = await _whole(self._adapters.publish, order, journal.folder, made)
            await _whole(journal.published, adapter)
        await self._announcer.published(adapter)
        await self._acknowledge(adapter, journal)
        return adapter

    async def _train(self, training: "_Training") -> None:
        """Has children train until one has made the adapter; one that dies is followed by another."""
        order, journal = training.order, training.journal
        await _whole(journal.validating)
        data = await patiently(
            lambda: self._files.read(order.file_id, order.file_sha256), budget_s=self._policy.file_patience_s
        )
        spec = {
            **self._policy.child,
            "model": order.model,
            "hyperparameters_json": order.hyperparameters_json,
            "seed": order.seed,
        }
        await _whole(journal.folder.write_input, data, spec)
        while True:
            end = await self._trainings.run(journal.folder, training.on_message)
            training.check()
            if end.status == 0 and training.made is not None:
                return
            deaths = await _whole(journal.died, training.step, end.status, end.last_words)
            if deaths >= (_MAX_KILLS if end.status < 0 else _MAX_DEATHS):
                raise _gave_up(training.step, end.status, end.last_words, deaths)
            await asyncio.sleep(self._policy.restart_pause_s)

    async def _acknowledge(self, adapter: Adapter, journal: Journal) -> None:
        try:
            await patiently(lambda: self._serving.load(adapter), budget_s=self._policy.acknowledge_patience_s)
        except PlatformError as error:
            if not is_transient(error):
                raise
            # The adapter is durable and the event is out: an engine that comes back loads it by itself.
            await _whole(journal.not_acknowledged, error.message)
        else:
            await _whole(journal.acknowledged)


class _Training:
    """One job's children, seen from here."""

    def __init__(self, order: TrainOrder, journal: Journal, watcher: Watcher) -> None:
        self.order = order
        self.journal = journal
        self.step = 0
        self.made: ChildMessage | None = None
        self._watcher = watcher
        self._refusal: PlatformError | None = None

    async def on_message(self, message: ChildMessage) -> None:
        """Takes what a child tells."""
        match message["kind"]:
            case "planned":
                await _whole(self.journal.planned, message)
            case "resumed":
                self.step = int(message["step"])
                await _whole(self.journal.resumed, self.step)
            case "step":
                self.step = int(message["step"])
                await _whole(self.journal.stepped, self.step, float(message["loss"]))
            case "made":
                self.made = message
            case "refused":
                self._refusal = PlatformError(Code(message["code"]), str(message["message"]), retryable=False)
            case "no_space":
                self._refusal = no_space(str(message["message"]))
        await self._watcher.report(self.step, self.journal.run.total_steps)

    def check(self) -> None:
        """Raises where a child has said that the job cannot be done."""
        if self._refusal is not None:
            raise self._refusal

    def result(self) -> dict[str, Any]:
        """Returns what goes into the adapter's manifest."""
        assert self.made is not None
        steps = self.journal.folder.steps()
        return {
            **self.made,
            "plan": self.journal.run.plan,
            "trained_tokens": sum(step.num_tokens for step in steps),
            "final_loss": steps[-1].loss,
        }


def _gave_up(step: int, status: int, last_words: str, deaths: int) -> PlatformError:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    hint = " (for want of memory, perhaps)" if status == -9 else ""
    tail = "\n".join(last_words.splitlines()[-5:])[-800:]
    message = f"the training process {how}{hint} {deaths} times at step {step}: {tail or 'it said nothing'}"
    return PlatformError(Code.INTERNAL, message)


async def _stoppable(work: Coroutine[Any, Any, T], check: Callable[[], None]) -> T:
    """Runs the work and stops it when `check` raises; its clean-up has ended before that is raised."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_CHECK_S)
            if not task.done():
                check()
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _whole(function: Callable[..., T], *arguments: Any) -> T:
    """Runs a blocking function in a thread, to its end even where nobody waits any more: threads cannot be stopped."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
