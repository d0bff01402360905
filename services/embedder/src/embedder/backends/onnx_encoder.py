"""A sentence encoder on ONNX Runtime, with the tokenizers library. No torch.

The prepared tokenizer.json neither cuts nor pads; both are done here, to what the encoder reads.
"""

import os
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

# Since 1.29 the runtime sends statistics of its use, natively, unless this stands before its import.
os.environ |= {"ORT_DISABLE_TELEMETRY": "1"}
import onnxruntime

from chassis.errors import Code, PlatformError
from embedder.core.inputs import EncoderInfo, TokenSpan
from embedder.core.pooling import Floats, mean_pool, normalise
from modelstore import Manifest


class OnnxEncoder:
    """An encoder from a verified folder of the model store. Made by `load`, which blocks for about a second."""

    def __init__(self, info: EncoderInfo, tokenizer: Tokenizer, session: onnxruntime.InferenceSession) -> None:
        self.info = info
        self._tokenizer = tokenizer
        self._session = session
        self._wanted = {node.name for node in session.get_inputs()}
        empty = tokenizer.encode("", add_special_tokens=True).ids
        self._first, self._last = empty[0], empty[-1]

    @classmethod
    def load(cls, model_dir: Path, num_threads: int, device: str = "cpu") -> "OnnxEncoder":
        """Verifies and loads a model onto `device`, cpu or cuda. Raises PlatformError(DATA_LOSS) where a file is not
        what the manifest says, FAILED_PRECONDITION where the model is of another kind or the device is not there."""
        manifest = Manifest.load(model_dir)
        if manifest.kind != "encoder":
            raise PlatformError(Code.FAILED_PRECONDITION, f"model {manifest.id} in {model_dir} is no encoder")
        manifest.verify()
        tokenizer = Tokenizer.from_file(str(manifest.path("tokenizer.json")))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        info = EncoderInfo(
            id=manifest.id,
            version=manifest.version,
            dimensions=int(manifest.config["dimensions"]),
            max_tokens=int(manifest.config["max_tokens"]),
            num_special_tokens=tokenizer.num_special_tokens_to_add(is_pair=False),
            vocabulary_size=tokenizer.get_vocab_size(),
            created_unix_s=manifest.created_unix_s,
        )
        return cls(info, tokenizer, _open_session(manifest.path("model.onnx"), num_threads, device))

    def tokenize(self, text: str) -> list[TokenSpan]:
        # `encode` keeps the interpreter's lock (180,000 tokens held the event loop for 2.4 s); `encode_batch` does not.
        (encoded,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        return [TokenSpan(i, start, end) for i, (start, end) in zip(encoded.ids, encoded.offsets, strict=True)]

    def encode(self, batch: list[list[int]]) -> Floats:
        width = max(len(ids) for ids in batch) + 2
        ids = np.zeros((len(batch), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens) + 2] = [self._first, *tokens, self._last]
            mask[row, : len(tokens) + 2] = 1
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (hidden, *_) = self._session.run(None, {k: v for k, v in feeds.items() if k in self._wanted})
        return normalise(mean_pool(hidden, mask))


def _open_session(path: Path, num_threads: int, device: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Spinning threads take the core that another service on the same machine needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = f"{device.upper()}ExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise PlatformError(Code.FAILED_PRECONDITION, f"this ONNX Runtime cannot run on {device}: {wanted} is absent")
    if device == "cuda":
        onnxruntime.preload_dlls()  # CUDA's libraries lie in packages of their own, off the linker's path
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
    except Exception as error:  # onnxruntime raises many kinds, none with a common base
        raise PlatformError(Code.DATA_LOSS, f"{path.name} cannot be loaded: {error}") from error
    if wanted not in session.get_providers():  # it falls back to the CPU with a warning, at a tenth of the speed
        raise PlatformError(Code.FAILED_PRECONDITION, f"ONNX Runtime finds no usable device for {wanted}")
    return session
