"""Reads task files: YAML without anchors, aliases and tags, every key known and given once, every type as it must be.

A message names the field; the format is described in the README.
"""

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from chassis.errors import Code, PlatformError
from evaluator.core.tasks import ANSWER_METRICS, KNOWN_METRICS, TEXT_METRICS, Generation, Sample, Task, Turn

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
MAX_SAMPLES = 1000
MAX_TEXTS = 100
_MAX_PROBLEMS = 3  # that one message tells
_MAX_DEPTH = 8
_MAX_EVENTS = 100_000

_Text = Annotated[str, StringConstraints(min_length=1, max_length=16_384)]
_Passage = Annotated[str, StringConstraints(min_length=16, max_length=65_536)]
_Reference = Annotated[str, StringConstraints(min_length=1, max_length=8192)]
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class _Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: _Text


class _Sample(_Strict):
    prompt: _Text | None = None
    messages: list[_Message] | None = Field(None, min_length=1, max_length=32)
    references: list[_Reference] = Field(min_length=1, max_length=16)

    @model_validator(mode="after")
    def _has_one_question(self) -> "_Sample":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of prompt and messages must be given")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError("messages must end with a turn of the user")
        return self

    def turns(self) -> tuple[Turn, ...]:
        if self.prompt is not None:
            return (Turn("user", self.prompt),)
        return tuple(Turn(message.role, message.content) for message in self.messages or ())


class _Generation(_Strict):
    max_tokens: int = Field(64, ge=1, le=1024)
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    stop: list[_Stop] = Field([], max_length=4)


class _TaskFile(_Strict):
    name: str = Field(pattern=NAME_PATTERN)
    version: str = Field(pattern=r"^[a-z0-9._-]{1,32}$")
    description: str = Field("", max_length=2000)
    metrics: list[str] = Field(min_length=1, max_length=16)
    system: _Text | None = None
    generation: _Generation = _Generation()
    samples: list[_Sample] = Field([], max_length=MAX_SAMPLES)
    texts: list[_Passage] = Field([], max_length=MAX_TEXTS)

    @model_validator(mode="after")
    def _metrics_have_what_they_score(self) -> "_TaskFile":
        for place, name in enumerate(self.metrics):
            if name not in KNOWN_METRICS:
                known = ", ".join(KNOWN_METRICS)
                raise ValueError(f"metrics[{place}]: {name[:64]!r} is no known metric; known are {known}")
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("metrics: a metric is named twice")
        for field, group, filled in (("samples", ANSWER_METRICS, self.samples), ("texts", TEXT_METRICS, self.texts)):
            wanting = [name for name in self.metrics if name in group]
            if wanting and not filled:
                raise ValueError(f"{field}: there are none, and {wanting[0]} needs some")
            if filled and not wanting:
                raise ValueError(f"{field}: no metric of this task reads them; {', '.join(group)} would")
        return self


class _Loader(yaml.CSafeLoader):
    """PyYAML's safe loader, which alone would take the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                message = f"the key {key[:64]!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_task(data: bytes) -> Task:
    """Returns the task of a file; raises INVALID_ARGUMENT with the field and the reason. Blocks for its parsing."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _refused(f"it is not UTF-8 (byte {error.start})") from None
    loaded = _load(text)
    if loaded is None:
        raise _refused("it is empty")
    if not isinstance(loaded, dict):
        raise _refused(f"it must be a mapping with name, version, metrics and so on, not a {type(loaded).__name__}")
    try:
        return _task(_TaskFile.model_validate(loaded))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        told = [_problem(problem) for problem in problems[:_MAX_PROBLEMS]]
        more = len(problems) - len(told)
        raise _refused("; ".join(told) + (f"; and {more} more" if more else "")) from None


def _load(text: str) -> object:
    try:
        _check_events(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _refused(f"{where}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise _refused(f"it is not YAML that can be read: {str(error)[:200]}") from None


def _check_events(text: str) -> None:
    """Refuses what can grow out of bounds, before anything is built: aliases repeat, and nesting goes to the stack."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.CSafeLoader)):
        where = f"line {event.start_mark.line + 1}: " if event.start_mark else ""
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refused(f"{where}anchors and aliases (& and *) are not allowed; quote a text that begins so")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise _refused(f"{where}it is nested more than {_MAX_DEPTH} deep")
        if number > _MAX_EVENTS:
            raise _refused(f"it holds more than {_MAX_EVENTS} values; a task may have {MAX_SAMPLES} samples")


def _problem(problem: Any) -> str:
    """One line of pydantic's, as "samples[3].references: ..."."""
    where = ""
    for step in problem["loc"]:
        where += f"[{step}]" if isinstance(step, int) else f".{step}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "this field is not known"
    elif problem["type"] == "string_type":
        message = "it must be a text; quote numbers, dates, yes and no"
    return f"{where.lstrip('.')}: {message}" if where else message


def _task(read: _TaskFile) -> Task:
    system = (Turn("system", read.system),) if read.system is not None else ()
    return Task(
        name=read.name,
        version=read.version,
        metrics=tuple(read.metrics),
        samples=tuple(Sample(system + sample.turns(), tuple(sample.references)) for sample in read.samples),
        texts=tuple(read.texts),
        generation=Generation(read.generation.max_tokens, read.generation.temperature, tuple(read.generation.stop)),
        description=read.description,
    )


def _refused(reason: str) -> PlatformError:
    return PlatformError(Code.INVALID_ARGUMENT, f"task file: {reason}", param="task")
