"""The Open Inference Protocol over gRPC: keys, infer in both forms, streams, accounts, and bad input."""

import struct

import grpc
import pytest
from pressroom.inference import grpc_service_pb2 as wire
from pressroom.inference import grpc_service_pb2_grpc

from chassis import rpc
from chassis.errors import Code, PlatformError
from testkit.waiting import eventually

from .conftest import BASE, ENCODER, KEY

MINE = (("authorization", f"Bearer {KEY}"),)


@pytest.fixture
async def stub(gateway):
    async with rpc.connect(gateway.grpc_addr) as channel:
        yield grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)


def raw(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def ask(model: str, name: str, *values: str, is_raw: bool = True, **parameters) -> wire.ModelInferRequest:
    request = wire.ModelInferRequest(model_name=model, id="mine")
    tensor = request.inputs.add(name=name, datatype="BYTES", shape=[len(values)])
    encoded = [value.encode() for value in values]
    if is_raw:
        request.raw_input_contents.append(raw(*encoded))
    else:
        tensor.contents.bytes_contents.extend(encoded)
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for key, value in parameters.items():
        setattr(request.parameters[key], kinds[type(value)], value)
    return request


async def refused(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


async def test_health_needs_no_key_and_models_do(gateway, stub):
    assert (await stub.ServerLive(wire.ServerLiveRequest())).live
    assert (await stub.ServerReady(wire.ServerReadyRequest())).ready
    assert (await stub.ServerMetadata(wire.ServerMetadataRequest())).name == "pressroom"
    for call in (
        lambda metadata: stub.ModelReady(wire.ModelReadyRequest(name=BASE), metadata=metadata),
        lambda metadata: stub.ModelMetadata(wire.ModelMetadataRequest(name=BASE), metadata=metadata),
        lambda metadata: stub.ModelInfer(ask(BASE, "text_input", "x"), metadata=metadata),
    ):
        for metadata in (
            (),
            (("authorization", "Bearer sk-boot-wrongwrongwrongwrong"),),
            (("authorization", KEY),),
            (("authorization", "Basic " + KEY),),
            (*MINE, *MINE),
            (("x-tenant", "default"),),
        ):
            assert (await refused(call(metadata)))[0] is grpc.StatusCode.UNAUTHENTICATED, metadata
    assert gateway.generator.calls == [] and await gateway.usage() == []


async def test_metadata_and_readiness_of_models(stub):
    told = await stub.ModelMetadata(wire.ModelMetadataRequest(name=ENCODER), metadata=MINE)
    assert [(one.name, one.datatype, list(one.shape)) for one in told.outputs] == [("embedding", "FP32", [-1, -1])]
    assert (await stub.ModelReady(wire.ModelReadyRequest(name=BASE), metadata=MINE)).ready
    assert not (await stub.ModelReady(wire.ModelReadyRequest(name="nobody"), metadata=MINE)).ready
    unknown = stub.ModelMetadata(wire.ModelMetadataRequest(name=BASE, version="2"), metadata=MINE)
    assert (await refused(unknown))[0] is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("is_raw", [True, False])
async def test_both_kinds_of_models_in_both_forms(gateway, stub, is_raw):
    call = stub.ModelInfer(ask(BASE, "text_input", "uno", is_raw=is_raw, max_tokens=7, temperature=0.5), metadata=MINE)
    answer = await call
    assert (answer.model_name, answer.id, answer.outputs[0].name) == (BASE, "mine", "text_output")
    given = answer.raw_output_contents[0] if is_raw else raw(*answer.outputs[0].contents.bytes_contents)
    assert given == raw(b"so: uno")
    assert answer.parameters["completion_tokens"].int64_param == 2
    asked = gateway.generator.calls[0]
    assert (asked.tenant, asked.stopping.max_tokens, asked.sampling.temperature) == ("default", 7, 0.5)

    answer = await stub.ModelInfer(ask(ENCODER, "text", "a", "b", is_raw=is_raw), metadata=MINE)
    output = answer.outputs[0]
    vectors = struct.unpack("<4f", answer.raw_output_contents[0]) if is_raw else tuple(output.contents.fp32_contents)
    assert (list(output.shape), vectors) == ([2, 2], (0.5, 0.25, 0.5, 0.25))
    await gateway.accounted([(ENCODER, 1, 0, 2, 0), (BASE, 1, 0, 3, 2)], slice(2, 7))
    trailing = dict(await call.trailing_metadata())
    assert trailing["x-request-id"].startswith("req_")


async def test_a_tenant_that_the_client_names_is_not_believed(gateway, stub):
    metadata = (*MINE, ("x-tenant", "other"), ("x-request-id", "evil id; DROP"))
    await stub.ModelInfer(ask(BASE, "text_input", "x"), metadata=metadata)
    assert gateway.generator.calls[0].tenant == "default"
    await gateway.accounted([("default",)], slice(None, 1))


async def _streamed(stub, *requests):
    async def sent():
        for request in requests:
            yield request

    return [one async for one in stub.ModelStreamInfer(sent(), metadata=MINE)]


async def test_a_stream_gives_text_piece_by_piece_and_goes_on_after_an_error(gateway, stub):
    answers = await _streamed(
        stub,
        ask(BASE, "text_input", "uno", stream=True, triton_enable_empty_final_response=True),
        ask("nobody", "text_input", "x"),
        ask(BASE, "text_input", "due"),
    )
    pieces = [(one.infer_response.raw_output_contents[0], one.infer_response.outputs[0].name) for one in answers[:3]]
    assert pieces == [(raw(b"so: "), "text_output"), (raw(b"uno"), "text_output"), (raw(b""), "text_output")]
    assert answers[2].infer_response.raw_output_contents[1] == raw(b"stop")
    assert answers[3].infer_response.parameters["triton_final_response"].bool_param
    assert "nobody" in answers[4].error_message and answers[4].infer_response.id == "mine"
    assert answers[5].infer_response.raw_output_contents[0] == raw(b"so: due")
    assert len(answers) == 6
    await gateway.accounted([("", 1, 1, 0, 0), (BASE, 2, 0, 6, 4)], slice(2, 7))


async def test_a_call_that_is_cancelled_stops_the_work_and_is_accounted(gateway, stub):
    gateway.generator.held = {"x"}
    call = stub.ModelInfer(ask(BASE, "text_input", "x"), metadata=MINE)
    await eventually(lambda: gateway.generator.num_running == 1)
    call.cancel()
    await eventually(lambda: gateway.generator.num_running == 0)
    await gateway.accounted([(1, 0, 3, 1)], slice(3, 7))


async def test_a_deadline_of_the_clients_is_kept(gateway, stub):
    gateway.generator.held = {"x"}
    call = stub.ModelInfer(ask(BASE, "text_input", "x"), metadata=MINE, timeout=0.5)
    assert (await refused(call))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: gateway.generator.num_running == 0)


def _changed(**changes) -> wire.ModelInferRequest:
    request = ask(BASE, "text_input", "x")
    for name, value in changes.items():
        setattr(request.inputs[0], name, value)
    return request


def _with_raw(*blobs: bytes) -> wire.ModelInferRequest:
    request = ask(BASE, "text_input", "x")
    del request.raw_input_contents[:]
    request.raw_input_contents.extend(blobs)
    return request


def _two_inputs() -> wire.ModelInferRequest:
    request = ask(BASE, "text_input", "x", is_raw=False)
    request.inputs.add(name="other", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"a", b"b"])
    return request


def _wrong_contents() -> wire.ModelInferRequest:
    request = wire.ModelInferRequest(model_name=BASE)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.int_contents.append(1)
    return request


def _empty_parameter() -> wire.ModelInferRequest:
    request = ask(BASE, "text_input", "x")
    request.parameters["max_tokens"].SetInParent()
    return request


def _unknown_output() -> wire.ModelInferRequest:
    request = ask(BASE, "text_input", "x")
    request.outputs.add(name="logits")
    return request


BAD_REQUESTS = {
    "nothing": (wire.ModelInferRequest(), Code.INVALID_ARGUMENT),
    "no inputs": (wire.ModelInferRequest(model_name=BASE), Code.INVALID_ARGUMENT),
    "unknown model": (ask("nobody", "text_input", "x"), Code.NOT_FOUND),
    "model with NUL": (ask("\0", "text_input", "x"), Code.NOT_FOUND),
    "unknown version": (wire.ModelInferRequest(model_name=BASE, model_version="7"), Code.NOT_FOUND),
    "unknown datatype": (_changed(datatype="BF16"), Code.INVALID_ARGUMENT),
    "another datatype": (_changed(datatype="UINT8"), Code.INVALID_ARGUMENT),
    "unknown input": (_two_inputs(), Code.INVALID_ARGUMENT),
    "contents of another type": (_wrong_contents(), Code.INVALID_ARGUMENT),
    "too few raw contents": (_with_raw(raw(b"x"), raw(b"y")), Code.INVALID_ARGUMENT),
    "raw cut short": (_with_raw(b"\x05\0\0\0x"), Code.INVALID_ARGUMENT),
    "raw of 4 GiB": (_with_raw(b"\xff\xff\xff\xffx"), Code.INVALID_ARGUMENT),
    "raw is no UTF-8": (_with_raw(raw(b"\xff")), Code.INVALID_ARGUMENT),
    "parameter without a value": (_empty_parameter(), Code.INVALID_ARGUMENT),
    "parameter of a wrong type": (ask(BASE, "text_input", "x", max_tokens="many"), Code.INVALID_ARGUMENT),
    "parameter out of bounds": (ask(BASE, "text_input", "x", temperature=9.0), Code.INVALID_ARGUMENT),
    "NaN": (ask(BASE, "text_input", "x", temperature=float("nan")), Code.INVALID_ARGUMENT),
    "infinity": (ask(BASE, "text_input", "x", top_p=float("inf")), Code.INVALID_ARGUMENT),
    "65 parameters": (ask(BASE, "text_input", "x", **{f"p{i}": i for i in range(65)}), Code.INVALID_ARGUMENT),
    "unknown output": (_unknown_output(), Code.INVALID_ARGUMENT),
    "empty text for the encoder": (ask(ENCODER, "text", ""), Code.INVALID_ARGUMENT),
}


async def test_bad_requests_are_refused_and_cost_nothing(gateway, stub):
    for case, (request, code) in BAD_REQUESTS.items():
        status, details = await refused(stub.ModelInfer(request, metadata=MINE))
        assert status.name == code.value, (case, details)
        assert gateway.generator.calls == [], case

    async def all_are_accounted() -> bool:
        rows = await gateway.usage()
        return [sum(row[column] for row in rows) for column in (3, 4, 5, 6)] == [len(BAD_REQUESTS)] * 2 + [0, 0]

    await eventually(all_are_accounted)


async def test_what_the_service_refuses_is_told(gateway, stub):
    gateway.generator.failures = {"x": [PlatformError(Code.OVERLOADED, "busy", retry_after_s=3)]}
    status, details = await refused(stub.ModelInfer(ask(BASE, "text_input", "x"), metadata=MINE))
    assert (status, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")


async def test_the_services_for_our_own_are_not_offered_to_clients(gateway):
    from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc

    async with rpc.connect(gateway.grpc_addr) as channel:
        graphs = gateway_pb2_grpc.GraphServiceStub(channel)
        call = graphs.Answer(gateway_pb2.AnswerRequest(model=BASE), metadata=(*MINE, ("x-tenant", "default")))
        assert (await refused(call))[0] is grpc.StatusCode.UNIMPLEMENTED
