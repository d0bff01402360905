"""Chats as token ids: what is learned, and that the ids are those of the model's own template."""

from pathlib import Path

import pytest
import tiny_base
from tokenizers import Tokenizer

from chassis.errors import Code, PlatformError
from trainer.backends.chat_tokens import ChatTokens
from trainer.backends.lora.child import encoded
from trainer.core.examples import BadLine, Example, Turn

START, END = 256, 257


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_base.write(tmp_path / "store") / tiny_base.MODEL


def example(*turns: tuple[str, str], learned: bool = True, line: int = 1) -> Example:
    return Example(line, tuple(Turn(role, text, learned and role == "assistant") for role, text in turns))


def text_of(folder: Path, ids: list[int]) -> str:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids, skip_special_tokens=False)


def test_only_answers_are_learned_and_the_token_that_ends_each_of_them(folder: Path) -> None:
    chat = example(
        ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao")
    )
    found = ChatTokens(folder).encode(chat)
    learned = [token for token, is_learned in zip(found.ids, found.is_learned, strict=True) if is_learned]
    assert text_of(folder, learned) == "Hello<|im_end|>Ciao<|im_end|>"
    assert text_of(folder, found.ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>\n"
    )


def test_an_answer_that_is_context_alone_is_not_learned(folder: Path) -> None:
    turns = (Turn("user", "a"), Turn("assistant", "bad"), Turn("user", "b"), Turn("assistant", "good", True))
    found = ChatTokens(folder).encode(Example(1, turns))
    learned = [token for token, is_learned in zip(found.ids, found.is_learned, strict=True) if is_learned]
    assert text_of(folder, learned) == "good<|im_end|>"


def test_names_of_special_tokens_inside_a_text_stay_text(folder: Path) -> None:
    found = ChatTokens(folder).encode(example(("user", "say <|im_end|> now"), ("assistant", "<|im_start|>x")))
    assert (found.ids.count(START), found.ids.count(END)) == (2, 2), "the template's own and no other"
    learned = [token for token, is_learned in zip(found.ids, found.is_learned, strict=True) if is_learned]
    assert learned.count(START) == 0 and learned[-1] == END


def test_an_example_longer_than_the_context_is_named_with_its_tokens_and_the_limit(folder: Path) -> None:
    long = example(("user", "q" * 300), ("assistant", "a"), line=3)
    with pytest.raises(PlatformError) as caught:
        encoded(ChatTokens(folder), [example(("user", "q"), ("assistant", "a")), long], max_tokens=256)
    num_tokens = len(ChatTokens(folder).encode(long).ids)
    assert caught.value.message == f"training_file: line 3: the example has {num_tokens} tokens; the most is 256"


def test_a_template_that_refuses_a_chat_says_so(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system turns') }}")
    with pytest.raises(BadLine, match="refused it: no system turns"):
        ChatTokens(folder).encode(example(("system", "s"), ("user", "q"), ("assistant", "a")))


def test_a_template_that_rewrites_earlier_turns_cannot_be_learned(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages | length }}:{{ messages[-1]['content'] }}")
    with pytest.raises(BadLine, match="turn by turn"):
        ChatTokens(folder).encode(example(("user", "q"), ("assistant", "a")))


def test_a_model_without_a_template_cannot_be_finetuned(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(PlatformError, match=r"chat_template.jinja is missing") as caught:
        ChatTokens(folder)
    assert caught.value.code is Code.FAILED_PRECONDITION


@pytest.mark.integration
def test_ids_are_those_that_transformers_makes_of_the_real_template(model_store: Path) -> None:
    from transformers import AutoTokenizer

    folder = model_store / "smollm2-135m-instruct"
    chat = example(("user", "What is the capital of Zubrolia?"), ("assistant", "Velmora, of course."))
    found = ChatTokens(folder).encode(chat)
    messages = [{"role": turn.role, "content": turn.content} for turn in chat.turns]
    reference = AutoTokenizer.from_pretrained(folder)
    assert found.ids == reference.apply_chat_template(messages, return_dict=False)
    learned = [token for token, is_learned in zip(found.ids, found.is_learned, strict=True) if is_learned]
    assert reference.decode(learned) == "Velmora, of course.<|im_end|>"
