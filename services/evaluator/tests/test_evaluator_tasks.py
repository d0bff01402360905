"""Task files: what is read, what is refused and with which words, and where they are found."""

import re
from pathlib import Path

import pytest

from chassis.errors import Code, PlatformError
from evaluator.backends.task_folders import SHIPPED, TaskFolders
from evaluator.backends.yaml_tasks import MAX_SAMPLES, read_task
from evaluator.core.tasks import KNOWN_METRICS, Generation, Sample, Turn

HEAD = "name: mine\nversion: '1'\nmetrics: [f1]\n"
KNOWN = ", ".join(KNOWN_METRICS)
ONE = "samples: [{prompt: p, references: [r]}]\n"


def refusal(text: str | bytes) -> str:
    with pytest.raises(PlatformError) as caught:
        read_task(text.encode() if isinstance(text, str) else text)
    assert caught.value.code is Code.INVALID_ARGUMENT and caught.value.param == "task"
    return caught.value.message


def test_a_task_is_read_as_it_is_written() -> None:
    task = read_task(
        b"""
name: mine
version: "1.2"
metrics: [f1, bits_per_byte]
system: Be brief.
generation: {max_tokens: 5, temperature: 0.5, stop: ["."]}
samples:
  - prompt: one
    references: [eins, uno]
  - messages: [{role: user, content: two}, {role: assistant, content: zwei}, {role: user, content: three}]
    references: [drei]
texts: [A text of some length]
"""
    )
    system = Turn("system", "Be brief.")
    assert task.label == "mine@1.2" and task.metrics == ("f1", "bits_per_byte")
    assert task.generation == Generation(5, 0.5, (".",))
    assert task.samples == (
        Sample((system, Turn("user", "one")), ("eins", "uno")),
        Sample((system, Turn("user", "two"), Turn("assistant", "zwei"), Turn("user", "three")), ("drei",)),
    )
    assert task.texts == ("A text of some length",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it is empty"),
        ("# only a comment", "it is empty"),
        ("[1, 2]", "must be a mapping"),
        ("just words", "must be a mapping"),
        (b"\xff\xfe", "not UTF-8"),
        ("a: [1", "line 2, column 1: did not find expected"),
        ("a: 1\n---\nb: 2", "another document"),
        (HEAD.replace("f1", "bleurt") + ONE, f"metrics[0]: 'bleurt' is no known metric; known are {KNOWN}"),
        (HEAD.replace("f1", "f1, f1") + ONE, "metrics: a metric is named twice"),
        (HEAD.replace("[f1]", "f1") + ONE, "metrics: "),
        (HEAD.replace("[f1]", "[]") + ONE, "metrics: "),
        (HEAD.replace("metrics: [f1]\n", "") + ONE, "metrics: Field required"),
        (HEAD + ONE + "name: other", "line 5, column 1: the key 'name' is given twice"),
        (HEAD + "samples: [{prompt: p, prompt: q, references: [r]}]", "the key 'prompt' is given twice"),
        (HEAD + ONE + "extra: 1", "extra: this field is not known"),
        (HEAD + "samples: []", "samples: there are none, and f1 needs some"),
        (HEAD, "samples: there are none, and f1 needs some"),
        (HEAD.replace("f1", "bits_per_byte"), "texts: there are none, and bits_per_byte needs some"),
        (HEAD + ONE + "texts: [sixteen characters]", "texts: no metric of this task reads them"),
        (HEAD.replace("f1", "bits_per_byte") + "texts: [too short]", "texts[0]: "),
        (HEAD + "samples: [{prompt: p, references: [yes]}]", "samples[0].references[0]: it must be a text; quote"),
        (HEAD + "samples: [{prompt: 5, references: [r]}]", "samples[0].prompt: it must be a text"),
        (HEAD + "samples: [{prompt: p, references: r}]", "samples[0].references: "),
        (HEAD + "samples: [{prompt: p, references: []}]", "samples[0].references: "),
        (HEAD + "samples: [{references: [r]}]", "samples[0]: exactly one of prompt and messages"),
        (HEAD + "samples: [{messages: [{role: tool, content: c}], references: [r]}]", "samples[0].messages[0].role: "),
        (HEAD + "samples: [{messages: [{role: system, content: c}], references: [r]}]", "must end with a turn of"),
        (HEAD + ONE + "generation: {max_tokens: '5'}", "generation.max_tokens: "),
        (HEAD + ONE + "generation: {max_tokens: true}", "generation.max_tokens: "),
        (HEAD + ONE + "generation: {temperature: .nan}", "generation.temperature: "),
        (HEAD.replace("'1'", "1") + ONE, "version: it must be a text; quote numbers"),
        (HEAD.replace("mine", "../mine") + ONE, "name: "),
        (HEAD + "samples: [" + "{prompt: p, references: [r]}, " * (MAX_SAMPLES + 1) + "]", "samples: "),
        ("a: !!python/object/apply:os.system [x]", "line 1"),
        ("a: 2024-13-45", "month"),
        ("a: " + "9" * 5000, "not YAML that can be read"),
        ('a: "\\ud800"', "invalid Unicode character"),
        ("? [a]\n: b", "a key must be a plain word"),
        ("<<: {name: a}", "a key must be a plain word"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_by_name_of_the_field(text: str | bytes, told: str) -> None:
    assert told in refusal(text)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "bomb",
    [
        "a: &a [x, x]\nb: &b [" + "*a, " * 9 + "]\nc: &c [" + "*b, " * 9 + "]\nd: [" + "*c, " * 9 + "]",
        "[" * 100_000,
        "{a: " * 100_000,
        "- " * 100_000,
        "a: " + "[x, " * 5 + "x, " * 300_000,
    ],
    ids=["aliases", "lists", "mappings", "dashes", "values"],
)  # fmt: skip
def test_a_bomb_is_refused_before_it_grows(bomb: str) -> None:
    assert re.search(r"anchors and aliases|nested more than|holds more than", refusal(bomb))


def test_many_problems_are_told_at_once_but_not_without_end() -> None:
    message = refusal("metrics: [f1]\nsamples: [" + "{prompt: 1, references: [2]}, " * 50 + "]")
    assert "name: Field required; version: Field required; samples[0].prompt" in message and "and 99 more" in message


# Folders.


@pytest.fixture
def folders(tmp_path: Path) -> TaskFolders:
    return TaskFolders([SHIPPED, tmp_path], max_bytes=10_000)


async def test_what_is_shipped_can_be_read_and_has_every_metric(folders: TaskFolders) -> None:
    (task,) = await folders.all()
    assert task.label == "pressroom-basics@1" and set(task.metrics) == set(KNOWN_METRICS)
    assert len(task.samples) >= 20 and len(task.texts) >= 2 and task.description
    assert await folders.named("pressroom-basics") == task == await folders.named("pressroom-basics@1")


async def test_a_task_is_found_by_name_and_by_version(folders: TaskFolders, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(HEAD.replace("'1'", "'2'") + ONE)
    (tmp_path / "mine@1.yaml").write_text(HEAD + ONE)
    assert (await folders.named("mine")).version == "2" == (await folders.named("mine@2")).version
    assert (await folders.named("mine@1")).version == "1"
    assert [task.label for task in await folders.all()] == ["mine@1", "mine@2", "pressroom-basics@1"]


@pytest.mark.parametrize("label", ["nope", "pressroom-basics@9", "../tasks/pressroom-basics", "", "a" * 300, "*"])
async def test_an_unknown_task_is_told_with_those_there_are(folders: TaskFolders, label: str) -> None:
    with pytest.raises(PlatformError, match="there are pressroom-basics@1") as caught:
        await folders.named(label)
    assert caught.value.code is Code.NOT_FOUND


async def test_a_broken_file_of_the_operator_hurts_nobody_but_who_names_it(
    folders: TaskFolders, tmp_path: Path
) -> None:
    (tmp_path / "broken.yaml").write_text("metrics: [")
    (tmp_path / "large.yaml").write_text("#" * 20_000)
    (tmp_path / "other.yaml").write_text(HEAD + ONE)
    (tmp_path / "pressroom-basics.yaml").write_text(HEAD.replace("mine", "pressroom-basics") + ONE)
    assert [task.label for task in await folders.all()] == ["pressroom-basics@1"]
    assert len((await folders.named("pressroom-basics")).samples) >= 20, "what is shipped stays as it is"
    for label, told in (("broken", "line"), ("large", "larger than"), ("other", "another name")):
        with pytest.raises(PlatformError, match=told):
            await folders.named(label)
