"""The measure of one form of a model, against transformers on the same tiny model."""

import json
import math
from pathlib import Path

import pytest
import tiny_llama
import torch

from generator import measure
from generator.backends.torch_runner import RunnerOptions, make_runner

TOKENS = [(7 * i + i * i // 3) % 250 for i in range(700)]


def test_the_perplexity_is_that_of_transformers_in_the_same_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tiny_llama.write(tmp_path / "tiny")
    options = RunnerOptions(512, 8 << 20, 16, 1, "fp32")
    runner = make_runner(folder, options, model_id="tiny", version="1")
    monkeypatch.setattr(measure, "_PIECE_TOKENS", 300)
    found = measure.measure(runner, TOKENS, runner.block_size)

    config = LlamaConfig(**json.loads((folder / "config.json").read_text()))
    reference = LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    losses: list[float] = []
    for start in range(0, len(TOKENS), 300):
        ids = torch.tensor(TOKENS[start : start + 300])
        with torch.no_grad():
            logits = reference(ids[None]).logits[0]
        losses += torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").tolist()
    assert found["tokens"] == len(losses) == 697
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert found["prefill_tokens_per_s"] > 0 and found["decode_tokens_per_s"] > 0


def test_the_text_is_the_one_that_published_figures_name() -> None:
    """Another text gives other figures: change its name with it."""
    words = measure.TEXT.read_text(encoding="utf-8").split()
    assert (len(words), measure.TEXT.name) == (1988, "measure_text.txt")


def test_a_damaged_model_is_one_line_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure.main(["--model-dir", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("error: no model in") and told.out == ""
