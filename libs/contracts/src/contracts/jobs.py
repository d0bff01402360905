"""The wire side of what chassis.jobs and chassis.uploads do for the workers of jobs."""

from collections.abc import Sequence
from typing import Literal

import grpc
from google.protobuf.message import DecodeError
from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc

from contracts.subjects import progress

_STATUS = {
    "running": common_pb2.JOB_STATUS_RUNNING,
    "succeeded": common_pb2.JOB_STATUS_SUCCEEDED,
    "failed": common_pb2.JOB_STATUS_FAILED,
    "cancelled": common_pb2.JOB_STATUS_CANCELLED,
}


def encode_progress(
    job_id: str,
    status: Literal["running", "succeeded", "failed", "cancelled"],
    *,
    done: int,
    total: int,
    error: str,
    result_json: str,
    sequence: int,
    at_unix_ms: int,
) -> tuple[str, bytes]:
    """Returns subject and payload of one report of a job (JobProgress)."""
    message = events_pb2.JobProgress(
        job_id=job_id,
        status=_STATUS[status],
        done=done,
        total=total,
        error=error,
        result_json=result_json,
        sequence=sequence,
        at_unix_ms=at_unix_ms,
    )
    return progress(job_id), message.SerializeToString()


def decode_cancel(payload: bytes) -> str:
    """Returns the id that a RequestCancel message names; raises ValueError where it cannot be read."""
    try:
        return events_pb2.RequestCancel.FromString(payload).id
    except DecodeError as error:
        raise ValueError("not a RequestCancel message") from error


def open_file(
    channel: grpc.aio.Channel, file_id: str, timeout_s: float, metadata: Sequence[tuple[str, str]]
) -> "grpc.aio.UnaryStreamCall[gateway_pb2.ReadFileRequest, gateway_pb2.ReadFileResponse]":
    """Starts gateway.FileService.ReadFile; the call's messages carry `data`."""
    request = gateway_pb2.ReadFileRequest(file_id=file_id)
    return gateway_pb2_grpc.FileServiceStub(channel).ReadFile(request, timeout=timeout_s, metadata=metadata)
