"""APIs that are put into the words of OpenAI's chat: what they call its fields, for errors that name them."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from chassis.errors import PlatformError
from gateway.api.openai_chat import ChatBody

_TOOL_FIELD = re.compile(r"(tools\[\d+\])\.(function\.\w+)")


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one API calls the fields of a chat, where the names differ."""

    fields: Mapping[str, str]
    tool_fields: Mapping[str, str]  # of "function.name" and "function.parameters"

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Within it an error about a field of the chat becomes one about the API's own."""
        try:
            yield
        except PlatformError as error:
            if error.param is not None:
                theirs = self.name(error.param)
                error.message = error.message.replace(f"{error.param}:", f"{theirs}:", 1)
                error.param = theirs
            raise

    def params(self, chat: ChatBody) -> Mapping[str, str]:
        """What the API calls the fields that the generator names in its errors."""
        return {ours: self.name(name) for ours, name in chat.params().items()}

    def name(self, name: str) -> str:
        """What the API calls a field of the chat."""
        of_tool = _TOOL_FIELD.fullmatch(name)
        return f"{of_tool[1]}.{self.tool_fields[of_tool[2]]}" if of_tool else self.fields.get(name, name)
