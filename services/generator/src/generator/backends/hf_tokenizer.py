"""The tokenizer of a model folder, on the `tokenizers` library: byte-level BPE with a chat template."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as RawTokenizer

from chassis.errors import Code, PlatformError
from generator.backends.chat_template import ChatTemplate
from generator.core.text import ChatMessage

# Marks where the tokenizer must not join characters. A lone surrogate: no text that came as UTF-8 holds one.
_CUT = "\ud800"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class HfTokenizer:
    """See core.text.Tokenizer. Thread-safe."""

    def __init__(self, raw: RawTokenizer, template: ChatTemplate | None) -> None:
        self._raw = raw
        self._template = template
        self._names: dict[int, str] = {}
        self._bytes: list[bytes] = [b""] * raw.get_vocab_size(with_added_tokens=True)
        to_byte = {char: byte for byte, char in _byte_chars().items()}
        for token, token_id in raw.get_vocab(with_added_tokens=False).items():
            self._bytes[token_id] = bytes(to_byte[char] for char in token if char in to_byte)
        for token_id, added in raw.get_added_tokens_decoder().items():
            self._bytes[token_id] = b"" if added.special else added.content.encode()
            self._names[token_id] = added.content
        longest_name = max((len(name.encode()) for name in self._names.values()), default=1)
        self._max_token_bytes = max(longest_name, *map(len, self._bytes))
        added_tokens = raw.get_added_tokens_decoder().values()
        self._special_names = [added.content for added in added_tokens if added.special and len(added.content) > 1]
        # Matches the first character of each name, so that names which overlap are found too.
        self._special_start = re.compile(f"(?={'|'.join(map(re.escape, self._special_names))})(.)", re.DOTALL)

    @classmethod
    def load(cls, folder: Path) -> "HfTokenizer":
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja. Raises PlatformError."""
        text = (folder / "tokenizer.json").read_text()
        decoder = json.loads(text).get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            raise PlatformError(
                Code.FAILED_PRECONDITION, f"{folder.name}: only byte-level tokenizers are served, not {decoder!r}"
            )
        raw = RawTokenizer.from_str(text)
        raw.no_truncation()
        raw.no_padding()
        return cls(raw, _load_template(folder))

    @property
    def max_token_bytes(self) -> int:
        return self._max_token_bytes

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        return self._encode([text], add_special_tokens=True)

    def encode_chat(self, messages: Sequence[ChatMessage], tools_json: str) -> list[int]:
        """See Tokenizer.encode_chat."""
        if self._template is None:
            raise PlatformError(Code.UNIMPLEMENTED, "this model has no chat template", reason="unsupported")
        prompt = self._template.render(messages, tools_json, self._as_plain_text)
        # The template writes the special tokens itself.
        return self._encode(prompt.split(_CUT), add_special_tokens=False)

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[int]:
        # `encode` would keep the interpreter's lock, which loop and engine wait for; `encode_batch` does not.
        encoded = self._raw.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [token_id for one in encoded for token_id in one.ids]

    def _as_plain_text(self, text: str) -> str:
        """Cuts the names of special tokens in two, so that nobody ends a turn or begins one by writing their names."""
        if not any(name in text for name in self._special_names):
            return text
        return self._special_start.sub(rf"\1{_CUT}", text)

    def token_bytes(self, token_id: int) -> bytes:
        """See Vocabulary.token_bytes; ids that the model has and the tokenizer has not add nothing."""
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        """See Vocabulary.token_text."""
        return self._names.get(token_id) or self.token_bytes(token_id).decode(errors="replace")


def _load_template(folder: Path) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    if not path.exists():
        return None
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = {name: config.get(name) for name in _SPECIAL_NAMES}
    # Older files keep a token as an object with its content.
    flat = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
    return ChatTemplate(path.read_text(), {name: value for name, value in flat.items() if value is not None})


def _byte_chars() -> dict[int, str]:
    """Returns the printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table
