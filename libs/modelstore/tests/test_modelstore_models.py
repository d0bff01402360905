"""The real conversions, against transformers and sentence-transformers as slow references."""

import json
from pathlib import Path

import numpy as np
import pytest

from modelstore import Manifest, prepare
from modelstore.sources import load_sources, locate_inputs

pytestmark = pytest.mark.integration

SOURCES = {source.id: source for source in load_sources()}
LLM = "smollm2-135m-instruct"
ENCODER = "all-minilm-l6-v2"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("models")
    assert prepare.main(["--store", str(store)]) == 0
    return store


def test_both_models_are_made_and_left_alone_the_second_time(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["--store", str(store)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ready", LLM], ["ready", ENCODER]]
    files = {entry.path for entry in Manifest.load(store / LLM).files}
    assert files == {
        "model.int4.safetensors",
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_weights_are_bit_for_bit_those_of_transformers_own_gguf_loader(store: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GgufConfig

    _, inputs = locate_inputs(SOURCES[LLM])
    gguf = inputs[SOURCES[LLM].weights]
    reference = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    ours = load_file(store / LLM / "model.safetensors")
    expected = {k: v for k, v in reference.state_dict().items() if k != "lm_head.weight"}  # tied, so not stored
    assert set(ours) == set(expected)
    assert [name for name, weight in expected.items() if not torch.equal(weight, ours[name])] == []


def test_the_llm_loads_in_transformers_and_knows_its_template_and_end(store: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(store / LLM)
    model = AutoModelForCausalLM.from_pretrained(store / LLM)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id == 2


def test_the_llms_tokenizer_splits_digits_and_gives_texts_back(store: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(store / LLM / "tokenizer.json"))
    assert tokenizer.encode("in  2024").tokens == ["in", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer.encode("<|im_end|>").ids == [2]
    for text in ("Grüße, 印刷 🦜", "\t\tif x:\n    return 12.5  # ok\n\n", "it's  'quoted'"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_encoder_agrees_with_the_package_on_ragged_batches(store: Path) -> None:
    import onnxruntime
    import torch
    from transformers import BertModel

    _, inputs = locate_inputs(SOURCES[ENCODER])
    reference = BertModel.from_pretrained(inputs[SOURCES[ENCODER].weights].parent, add_pooling_layer=False).eval()
    session = onnxruntime.InferenceSession(str(store / ENCODER / "model.onnx"))
    numbers = np.random.default_rng(0)
    for shape in ((1, 1), (1, 3), (4, 33), (2, 256)):
        ids = numbers.integers(1000, 30000, shape)
        mask = np.ones(shape, dtype=np.int64)
        mask[-1, max(1, shape[1] // 2) :] = 0
        (ours,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
        np.testing.assert_allclose(ours[mask == 1], expected.numpy()[mask == 1], atol=1e-4)


def test_the_encoders_tokenizer_neither_cuts_nor_pads(store: Path) -> None:
    from tokenizers import Tokenizer

    document = json.loads((store / ENCODER / "tokenizer.json").read_text())
    assert document["truncation"] is None and document["padding"] is None
    tokenizer = Tokenizer.from_file(str(store / ENCODER / "tokenizer.json"))
    assert [len(tokenizer.encode("ink " * n).ids) for n in (1, 300)] == [3, 302]


def test_the_manifests_tell_what_the_services_need(store: Path) -> None:
    assert Manifest.load(store / LLM).config == {
        "architecture": "llama",
        "context_length": 8192,
        "dtype": "bfloat16",
        "earlier_versions": ["3279f51615ea"],
        "eos_token_ids": [2],
        "quantisation": {
            "int4": {
                "file": "model.int4.safetensors",
                "group_size": 32,
                "layout": "pressroom-pack-1",
                "source_dtype": "bfloat16",
            }
        },
        "vocab_size": 49152,
    }
    encoder = Manifest.load(store / ENCODER).config
    assert (encoder["dimensions"], encoder["max_tokens"], encoder["vocab_size"]) == (384, 256, 30522)
