"""Runs one evaluation: asks the questions, has the texts predicted, scores. Can be killed anywhere and run again.

Every answer is kept before the next is asked for, and a job that is run again asks only for what it has not. Knows
nothing of the bus.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from chassis.errors import Code, PlatformError
from chassis.patience import patiently
from evaluator.core.ports import (
    Files,
    Generator,
    Graph,
    GraphAnswer,
    Journal,
    Journals,
    Results,
    Scorer,
    ServedModel,
    Tasks,
    Watcher,
)
from evaluator.core.prediction import predict
from evaluator.core.results import Answer, Result, Scored, ScoringOrder, TextBits
from evaluator.core.tasks import ANSWER_METRICS, TEXT_METRICS, Generation, Task, Turn

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be evaluated: a task by its name, or a client's own file."""

    job_id: str
    tenant: str
    model: str
    task: str = ""
    task_file_id: str = ""
    task_file_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """How politely it asks: questions at once, and the seconds that one attempt waits for a service that is away."""

    concurrency: int
    patience_s: float


@dataclass(slots=True)
class _Run:
    """One attempt at one order."""

    order: Order
    task: Task
    journal: Journal
    watcher: Watcher
    num_done: int
    num_in_all: int

    async def keep(self, entry: Answer | TextBits) -> None:
        await self.journal.append(entry)
        self.num_done += 1
        await self.watcher.report(self.num_done, self.num_in_all)


class Evaluator:
    """Runs orders, one attempt at a time each."""

    def __init__(
        self,
        *,
        tasks: Tasks,
        files: Files,
        graph: Graph,
        generator: Generator,
        journals: Journals,
        scorer: Scorer,
        results: Results,
        policy: Policy,
    ) -> None:
        self._tasks = tasks
        self._files = files
        self._graph = graph
        self._generator = generator
        self._journals = journals
        self._scorer = scorer
        self._results = results
        self._policy = policy

    async def run(self, order: Order, watcher: Watcher) -> Result:
        """Returns the result, which is kept by then; an order that has one already costs nothing."""
        watcher.check()
        result = await self._results.get(order.job_id)
        if result is None:
            task = await self._task(order, watcher)
            model = await self._predicting_model(order, task, watcher)
            journal = await self._journals.open(order.job_id, task.fingerprint(order.model))
            done = len(journal.answers) + len(journal.texts)
            in_all = len(task.samples) + (len(task.texts) if model else 0)
            run = _Run(order, task, journal, watcher, done, in_all)
            await watcher.report(done, in_all)
            await self._ask(run)
            if model:
                await self._predict(run, model)
            await watcher.report(in_all, in_all)
            result = await self._score(run, model)
            await self._results.put(result)
        await self._journals.remove(order.job_id)
        return result

    async def abandon(self, job_id: str) -> None:
        """Forgets what was kept of a job that ends without a result."""
        await self._journals.remove(job_id)

    async def _task(self, order: Order, watcher: Watcher) -> Task:
        if not order.task_file_id:
            return await self._tasks.named(order.task)
        data = await patiently(
            lambda: self._files.read(order.task_file_id, order.task_file_sha256),
            budget_s=self._policy.patience_s,
            before_each=watcher.check,
        )
        return await self._tasks.read(data)

    async def _predicting_model(self, order: Order, task: Task, watcher: Watcher) -> ServedModel | None:
        """Returns whom to ask for log probabilities; None where the task does not want them or nobody has them."""
        if not set(TEXT_METRICS) & set(task.metrics):
            return None
        found = await patiently(
            lambda: self._generator.find(order.model), budget_s=self._policy.patience_s, before_each=watcher.check
        )
        if found is None and not task.samples:
            message = f"task: bits_per_byte needs a model of the generator, and {order.model!r} is none"
            raise PlatformError(Code.INVALID_ARGUMENT, message, param="task")
        if found is None:
            log.warning(
                "bits_per_byte is left out: only a model of the generator has log probabilities",
                extra={"job_id": order.job_id, "model": order.model},
            )
        elif not task.samples:
            # Only the gateway knows whose model it is, and nothing else of this job passes it.
            await self._answer(order, watcher, (Turn("user", "Hello"),), Generation(max_tokens=1), seed=0)
        return found

    async def _ask(self, run: _Run) -> None:
        """Asks the questions that have no answer yet."""

        async def ask(index: int) -> None:
            sample, label = run.task.samples[index], f"{run.task.label}/{index}"
            try:
                answer = await self._answer(
                    run.order, run.watcher, sample.turns, run.task.generation, seed=_seed(label)
                )
            except PlatformError as error:
                raise _of_part(f"samples[{index}]", error) from error
            _check_version(run.journal.answers, answer.model_version)
            await run.keep(Answer(index, answer.text, answer.model_version))

        missing = [index for index in range(len(run.task.samples)) if index not in run.journal.answers]
        await _each(missing, ask, self._policy.concurrency)

    async def _answer(
        self, order: Order, watcher: Watcher, turns: Sequence[Turn], generation: Generation, *, seed: int
    ) -> GraphAnswer:
        return await patiently(
            lambda: self._graph.answer(order.model, turns, generation, seed=seed, job_id=order.job_id),
            budget_s=self._policy.patience_s,
            before_each=watcher.check,
        )

    async def _predict(self, run: _Run, model: ServedModel) -> None:
        """Has the texts predicted that were not yet."""

        async def measure(index: int) -> None:
            try:
                bits = await predict(
                    self._generator,
                    model,
                    run.task.texts[index],
                    index,
                    budget_s=self._policy.patience_s,
                    before_each=run.watcher.check,
                )
            except PlatformError as error:
                raise _of_part(f"texts[{index}]", error) from error
            _check_version(run.journal.texts, bits.model_version)
            await run.keep(bits)

        missing = [index for index in range(len(run.task.texts)) if index not in run.journal.texts]
        await _each(missing, measure, self._policy.concurrency)

    async def _score(self, run: _Run, model: ServedModel | None) -> Result:
        answers, texts = run.journal.answers, run.journal.texts
        wanted = set(run.task.metrics) - (set() if model else set(TEXT_METRICS))
        scored = ScoringOrder(
            metrics=[name for name in ANSWER_METRICS + TEXT_METRICS if name in wanted],
            answers=[Scored(answers[i].text, sample.references) for i, sample in enumerate(run.task.samples)],
            texts=[texts[i] for i in range(len(run.task.texts))] if model else [],
        )
        values = await self._scorer.score(scored)
        order = run.order
        return Result(order.job_id, order.tenant, order.model, run.task.label, values)


async def _each(indices: Sequence[int], work: Callable[[int], Awaitable[None]], at_once: int) -> None:
    """Runs work for every index, so many at once; the first failure ends the others and is raised as it was."""
    left = iter(indices)

    async def worker() -> None:
        for index in left:
            await work(index)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(indices))):
                group.create_task(worker())
    except ExceptionGroup as failures:  # not except*: what is raised there comes wrapped, on some versions of 3.11
        raise failures.exceptions[0] from None


def _seed(label: str) -> int:
    """A seed that is the same in every run of a task, so that what a resumed job asks for does not depend on luck."""
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big") >> 1


def _check_version(kept: Mapping[int, Answer] | Mapping[int, TextBits], version: str) -> None:
    """Fails where a version differs from those before; "" stands where no model had to be asked."""
    first = next((entry.model_version for entry in kept.values() if entry.model_version), version)
    if version and first != version:
        message = f"the model changed during the evaluation, from version {first!r} to {version!r}"
        raise PlatformError(Code.FAILED_PRECONDITION, message, param="model")


def _of_part(part: str, error: PlatformError) -> PlatformError:
    """Names the part of the task that an error is about; what the task is not to blame for stays as it is."""
    if error.code not in (Code.INVALID_ARGUMENT, Code.OUT_OF_RANGE) or error.message.startswith(part):
        return error
    return PlatformError(error.code, f"{part}: {error.message}", param="task", reason=error.reason)
