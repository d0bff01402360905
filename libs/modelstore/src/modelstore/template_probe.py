"""The process that renders a template which nobody trusts yet: `python -m modelstore.template_probe`.

Reads {"source", "special_tokens"} as JSON on standard input, limits its own time and memory, and prints
{"refused": why, or empty} as one line. It dies by a signal where a limit is reached.
"""

import json
import resource
import sys
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError

from modelstore.chat_sandbox import make_environment

_CPU_S = 2
_MEMORY_BYTES = 512 * 1024 * 1024
_MAX_OUTPUT_CHARS = 64 * 1024
_USER = {"role": "user", "content": "What is the capital of France?"}
_CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [_USER],
    [{"role": "system", "content": "Answer briefly."}, _USER, {"role": "assistant", "content": "Paris."}, _USER],
)


class _Declined(jinja2.TemplateError):
    """The template itself refuses a conversation, such as one with a system's turn: that is its right."""


def _decline(message: str) -> None:
    raise _Declined(message)


def _hold(value: object, attribute: str) -> NoReturn:
    """Where it is served, what is out of reach is merely undefined; a template that tries is not wanted at all."""
    raise SecurityError(f"access to {attribute!r} of {type(value).__name__!r}")


def refusal(source: str, special_tokens: dict[str, str]) -> str:
    """Returns why a template is refused, or nothing."""
    environment = make_environment()
    environment.globals["raise_exception"] = _decline
    environment.unsafe_undefined = _hold  # type: ignore[method-assign,assignment]
    texts: list[str] = []
    try:
        template = environment.from_string(source)
        for messages in _CONVERSATIONS:
            try:
                fields: dict[str, Any] = {"messages": messages, "tools": None, "documents": None}
                texts.append(template.render(**fields, add_generation_prompt=True, **special_tokens))
            except _Declined:
                continue
    except SecurityError as error:
        return f"it reaches outside its sandbox: {error}"
    except MemoryError:
        return "rendering a short conversation took more memory than a template may use"
    except Exception as error:  # whatever a template manages to raise, it is not served
        return f"it does not render a short conversation: {type(error).__name__}: {error}"
    if not any(_USER["content"] in text for text in texts):
        return "it renders a question without the question"
    if max(map(len, texts)) > _MAX_OUTPUT_CHARS:
        return f"it makes more than {_MAX_OUTPUT_CHARS} characters of a short conversation"
    return ""


def main() -> None:
    told = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    print(json.dumps({"refused": refusal(told["source"], told["special_tokens"])[:2000]}))


if __name__ == "__main__":
    main()
