"""The gateway's GraphService: jobs ask a served graph as a client would, for the tenant that ordered the job.

What is used is accounted to the tenant, under the key that ordered the job and the route of evaluations; the texts are
left out of the record, so that profiles of real traffic stay what they are.
"""

from contextlib import aclosing
from dataclasses import dataclass, field

import grpc.aio
from pressroom.common.v1 import common_pb2
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc

from chassis import context, telemetry
from chassis.errors import Code, PlatformError
from gateway.api.json_body import validate
from gateway.api.openai_chat import ChatBody
from gateway.api.settlement import Recorder
from gateway.core.account import Account
from gateway.core.graph import Deadline, Graph, GraphEvent, GraphRequest
from gateway.core.jobs import JobStatus, JobStore
from gateway.core.keys import KeyRing
from gateway.core.ports import Principal
from gateway.core.services import Delta, Finished, Started
from gateway.core.serving import Ask, Serving

ROUTE = "/v1/evaluations"


@dataclass(slots=True)
class _Answer:
    """What the events of one answer come to."""

    text: list[str] = field(default_factory=list)
    finish_reason: str = ""
    model_version: str = ""

    def take(self, event: GraphEvent) -> None:
        match event:
            case Delta():
                self.text.append(event.text)
            case Started():
                self.model_version = event.model_version
            case Finished():
                self.finish_reason = event.reason


class GraphServicer(gateway_pb2_grpc.GraphServiceServicer):
    """Runs graphs for jobs."""

    def __init__(
        self, serving: Serving, keys: KeyRing, jobs: JobStore, recorder: Recorder, *, timeout_s: float
    ) -> None:
        self._serving = serving
        self._keys = keys
        self._jobs = jobs
        self._recorder = recorder
        self._timeout_s = timeout_s

    async def Answer(
        self, request: gateway_pb2.AnswerRequest, _: grpc.aio.ServicerContext
    ) -> gateway_pb2.AnswerResponse:
        """Answers one chat; a cancelled call stops the decoding.

        Raises INVALID_ARGUMENT, NOT_FOUND for a model that the tenant does not have, PERMISSION_DENIED for one that it
        or the key that ordered the job may not ask, FAILED_PRECONDITION when the job was cancelled (a worker that
        missed the call to stop learns it here), and what the graph's services raise.
        """
        called = context.current()
        if not called.tenant:
            raise PlatformError(Code.INVALID_ARGUMENT, "the metadata must name the tenant (x-tenant)")
        job = await self._jobs.get(called.tenant, request.job_id) if request.job_id else None
        if job is not None and (job.cancel_requested or job.status is JobStatus.CANCELLED):
            raise PlatformError(Code.FAILED_PRECONDITION, "the job was cancelled", reason="job_cancelled")
        principal = await self._keys.principal(job.key_id if job else "", called.tenant)
        graph = await self._serving.graph(principal, request.model)
        wanted = _graph_request(request, called.tenant)
        deadline = Deadline.after(called.remaining_s(self._timeout_s))
        return await self._run(
            Ask(principal, _account(called, principal, graph), deadline, graph.name, (wanted,)), graph
        )

    async def _run(self, ask: Ask, graph: Graph) -> gateway_pb2.AnswerResponse:
        answer, account = _Answer(), ask.account
        # Not the latencies: a job's answers wait behind people's, and would hide theirs.
        async with self._recorder.settling(account, counts_latency=False) as outcome:
            async with aclosing(self._serving.run(ask, graph)) as events:
                async for event in events:
                    answer.take(event)
            outcome.status = 200
        usage = account.told_usage
        return gateway_pb2.AnswerResponse(
            text="".join(answer.text),
            finish_reason=answer.finish_reason,
            usage=common_pb2.Usage(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
            ),
            grounded=account.grounded,
            model_version=answer.model_version,
        )


def _account(called: context.RequestContext, principal: Principal, graph: Graph) -> Account:
    traceparent = telemetry.traceparent()
    account = Account(
        request_id=called.request_id,
        trace_id=traceparent.split("-")[1] if traceparent else "",
        traceparent=traceparent,
        route=ROUTE,
        principal=principal,
    )
    account.model = graph.name
    return account


def _graph_request(request: gateway_pb2.AnswerRequest, tenant: str) -> GraphRequest:
    """Checks the request by the rules of the HTTP route and makes the graph's of it."""
    fields = {
        "model": request.model,
        "messages": [{"role": turn.role, "content": turn.content} for turn in request.messages],
        "max_tokens": request.max_tokens if request.HasField("max_tokens") else None,
        "temperature": request.temperature if request.HasField("temperature") else None,
        "seed": request.seed if request.HasField("seed") else None,
        "stop": list(request.stop) or None,
    }
    # Never before people: what is above the default is for them alone.
    return validate(fields, ChatBody).request(tenant, priority=min(request.priority, 0))
