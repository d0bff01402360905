"""Runs several prompts of one request at a time and merges their events into one stream."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from gateway.core.graph import GraphEvent
from gateway.core.services import Delta, Done, Finished, Started, ToolCallDelta, Usage

MAX_AT_ONCE = 16  # prompts of one request that the generator has at a time
_QUEUE_EVENTS = 64

Run = Callable[[], AsyncGenerator[GraphEvent]]


async def merged(runs: Sequence[Run], n: int) -> AsyncGenerator[GraphEvent]:
    """Streams the events of all runs, each of which has n choices; one Done with the sum comes last.

    Choices are numbered run by run. The first error ends everything. Close it in the task that iterates it.
    """
    queue: asyncio.Queue[tuple[int, GraphEvent | Exception | None]] = asyncio.Queue(_QUEUE_EVENTS)
    slots = asyncio.Semaphore(MAX_AT_ONCE)
    tasks = [asyncio.create_task(_pump(i, run, queue, slots)) for i, run in enumerate(runs)]
    usage, num_running = Usage(), len(tasks)
    try:
        while num_running:
            index, event = await queue.get()
            match event:
                case None:
                    num_running -= 1
                case Exception():
                    raise event
                case Done():
                    usage += event.usage
                case _:
                    yield _renumbered(event, index, n)
        yield Done(usage)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int,
    run: Run,
    queue: asyncio.Queue[tuple[int, GraphEvent | Exception | None]],
    slots: asyncio.Semaphore,
) -> None:
    try:
        async with slots, aclosing(run()) as events:
            async for event in events:
                await queue.put((index, event))
    except Exception as error:  # handed to the reader, which raises it
        await queue.put((index, error))
    else:
        await queue.put((index, None))


def _renumbered(event: GraphEvent, run_index: int, n: int) -> GraphEvent:
    match event:
        case Started():
            return replace(event, prompt_index=run_index)
        case Delta() | ToolCallDelta() | Finished():
            return replace(event, index=run_index * n + event.index)
    return event
