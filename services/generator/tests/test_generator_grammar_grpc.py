"""Grammars through a real gRPC server: every kind of the proto, refusals by name, and prompts that hold tools."""

import json
import re
from collections.abc import AsyncIterator

import pytest
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc

from chassis import rpc
from chassis.errors import Code, PlatformError
from generator.api.grammars import GrammarDesk
from generator.api.grpc import GeneratorServicer
from generator.backends.chat_template import ChatTemplate
from generator.backends.llguidance_grammar import LlguidanceCompiler, byte_tokenizer
from generator.backends.toy import ByteTokenizer, ToyRunner
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.library import AdapterLibrary
from generator.core.scheduler import SchedulerLimits
from generator.core.text import ChatMessage

Stub = generator_pb2_grpc.GeneratorServiceStub
TOOLS = json.dumps([{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}])
NO_ARGUMENTS = TOOLS.replace('"object"', '"object", "maxProperties": 0')
NO_LIST = TOOLS.replace('"object"', '"list"')
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture
async def stub() -> AsyncIterator[Stub]:
    compiler = LlguidanceCompiler(byte_tokenizer(), timeout_s=10.0, max_cached=8, num_workers=1)
    blocks = BlockManager(2000, 4)
    engine = BatchingEngine(ToyRunner(2000, 4, 4096), ByteTokenizer(), blocks, SchedulerLimits(), grammars=compiler)
    engine.start()
    desk = GrammarDesk(compiler, timeout_s=20.0, num_threads=1)
    server = rpc.make_server("generator")
    servicer = GeneratorServicer(engine, AdapterLibrary(engine, None), ByteTokenizer(), grammars=desk)
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rpc.connect(f"127.0.0.1:{port}") as channel:
        yield Stub(channel)
    await server.stop(0)
    await engine.close()
    await desk.close()


async def _generate(stub: Stub, grammar: pb.Grammar, **fields: object) -> tuple[str, int, int]:
    request = pb.GenerateRequest(model="toy", text="Set the type.", grammar=grammar, **fields)  # type: ignore[arg-type]
    request.stop.max_tokens = request.stop.max_tokens or 400
    async with rpc.call("generator.Generate", timeout_s=30) as call:
        stream = stub.Generate(request, timeout=call.timeout_s, metadata=call.metadata)
        messages = [message async for message in stream]
    text = "".join(message.delta.text for message in messages)
    return text, messages[-2].finished.reason, messages[-1].done.usage.completion_tokens


SHORT = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false}'


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (pb.Grammar(json_schema=SHORT), r'\{\s*"a"\s*:\s*[12]\s*\}'),
        (pb.Grammar(regex="[ab]{4}"), "[ab]{4}"),
        (pb.Grammar(choice=pb.Choice(options=["one\nline", "x"])), "one\nline|x"),
        (pb.Grammar(ebnf='start: "a" | "b"'), "a|b"),
        (
            pb.Grammar(tool_calls=pb.ToolCalls(tools_json=NO_ARGUMENTS, is_required=True)),
            r'<tool_call>\n\{"name": "now", "arguments": \{\}\}\n</tool_call>',
        ),
    ],
)
async def test_the_answer_keeps_to_every_kind_of_grammar(stub: Stub, grammar: pb.Grammar, pattern: str) -> None:
    text, reason, num_tokens = await _generate(stub, grammar)
    assert re.fullmatch(pattern, text), text
    assert reason == pb.FINISH_REASON_STOP and len(text) <= num_tokens <= len(text) + 1


async def test_json_that_max_tokens_cuts_ends_with_length(stub: Stub) -> None:
    text, reason, num_tokens = await _generate(
        stub, pb.Grammar(json_object=True), stop=pb.StopParams(max_tokens=3), sampling=pb.SamplingParams(temperature=0)
    )
    assert text.startswith("{") and (reason, num_tokens) == (pb.FINISH_REASON_LENGTH, 3)


@pytest.mark.parametrize(
    ("grammar", "param"),
    [
        (pb.Grammar(json_schema='{"type": "strin"}'), "grammar"),
        (pb.Grammar(json_schema=json.dumps({"enum": ["x" * 1000] * 1000})), "grammar"),
        (pb.Grammar(regex="("), "grammar"),
        (pb.Grammar(choice=pb.Choice()), "grammar"),
        (pb.Grammar(tool_calls=pb.ToolCalls(tools_json="[")), "tools"),
        (pb.Grammar(tool_calls=pb.ToolCalls(tools_json=NO_LIST)), "tools[0].function.parameters"),
    ],
)
async def test_a_grammar_that_cannot_be_had_is_refused_by_name(stub: Stub, grammar: pb.Grammar, param: str) -> None:
    with pytest.raises(PlatformError) as raised:
        await _generate(stub, grammar)
    assert (raised.value.code, raised.value.param) == (Code.INVALID_ARGUMENT, param)


def _call(arguments: str) -> str:
    return json.dumps([{"id": "c1", "type": "function", "function": {"name": "now", "arguments": arguments}}])


def test_a_template_that_knows_no_tools_gets_them_as_text() -> None:
    turns = [
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "What time is it?"),
        ChatMessage("assistant", "", _call('{"zone": "UTC"}')),
        ChatMessage("tool", "12:00", tool_call_id="c1"),
        ChatMessage("tool", "noon", tool_call_id="c2"),
    ]
    prompt = ChatTemplate(TEMPLATE, {}).render(turns, TOOLS)
    assert prompt.startswith("[system]Be brief.\n\nYou may call") and json.loads(TOOLS)[0]["function"]["name"] in prompt
    assert prompt.endswith(
        '[assistant]<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>'
        "[user]<tool_response>\n12:00\n</tool_response>\n<tool_response>\nnoon\n</tool_response>[assistant]"
    )


def test_a_template_that_knows_tools_gets_them_as_they_are_with_arguments_as_objects() -> None:
    template = "{{ tools[0].function.name }} {{ messages[0].tool_calls[0].function.arguments.zone }} <tool_call>"
    turns = [ChatMessage("assistant", "", _call('{"zone": "UTC"}'))]
    assert ChatTemplate(template, {}).render(turns, TOOLS) == "now UTC <tool_call>"


def test_arguments_that_were_cut_are_shown_as_they_were() -> None:
    turns = [ChatMessage("assistant", "", _call('{"zone": "U'))]
    assert '"arguments": "{\\"zone\\": \\"U"' in ChatTemplate(TEMPLATE, {}).render(turns, "")


def test_a_call_without_a_name_is_refused_by_name() -> None:
    turns = [ChatMessage("user", "x"), ChatMessage("assistant", "", '[{"function": {}}]')]
    with pytest.raises(PlatformError) as raised:
        ChatTemplate(TEMPLATE, {}).render(turns, "")
    assert raised.value.param == "messages[1].tool_calls[0]"
