"""The trainer's runs over gRPC. Implements core.finetuning.Runs."""

import json
import logging

import grpc.aio
from pressroom.trainer.v1 import trainer_pb2, trainer_pb2_grpc

from chassis import rpc
from chassis.errors import Code, PlatformError
from gateway.core.finetuning import Run, RunEvent

_log = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_LEVELS = ("info", "warn", "error")


class TrainerRuns:
    """Calls the trainer over a channel that the caller opened and closes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = trainer_pb2_grpc.TrainerServiceStub(channel)

    async def get(self, job_id: str) -> Run | None:
        """Returns a run; None where the trainer has none of it. Raises PlatformError, UNAVAILABLE when it is away."""
        request = trainer_pb2.GetRunRequest(job_id=job_id)
        try:
            async with rpc.call("trainer.GetRun", timeout_s=_TIMEOUT_S) as call:
                run = await self._stub.GetRun(request, timeout=call.timeout_s, metadata=call.metadata)
        except PlatformError as error:
            if error.code is Code.NOT_FOUND:
                return None
            raise
        return Run(
            step=run.step,
            total_steps=run.total_steps,
            losses=tuple(run.losses),
            trained_tokens=run.trained_tokens,
            events=tuple(_event(event) for event in run.events),
            tracker_run_id=run.tracker_run_id,
        )


def _event(event: trainer_pb2.RunEvent) -> RunEvent:
    return RunEvent(
        id=event.id,
        at_unix_ms=event.at_unix_ms,
        level=event.level if event.level in _LEVELS else "info",
        type="metrics" if event.type == "metrics" else "message",
        message=event.message,
        data=_data(event),
    )


def _data(event: trainer_pb2.RunEvent) -> dict[str, object] | None:
    if not event.data_json:
        return None
    try:
        data = json.loads(event.data_json)
    except ValueError:
        _log.warning("data of a run's event cannot be read", extra={"event_id": event.id})
        return None
    return data if isinstance(data, dict) else {"value": data}
