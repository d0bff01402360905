"""Models that people bring: what is made of them, what is refused, and what a killed run leaves."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import modelstore_tiny as tiny
import numpy as np
import pytest

from chassis.errors import Code, PlatformError
from modelstore import Manifest
from modelstore.adding import Added, Order, add
from modelstore.catalogue import entries, remove
from modelstore.formats import formats_of
from modelstore.manifest import sha256_of, write_manifest
from modelstore.origins import read_pins
from modelstore.packing import unpack_matrix
from modelstore.tensors import TensorClaim, TensorFile, write_tensors
from testkit import eventually_sync


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "Tiny Llama")


def _add(store: Path, source: Path | str, **fields: Any) -> Added:
    return add(store, Order(str(source), **fields), lambda step, done, total: None)


def _refused(store: Path, source: Path | str, **fields: Any) -> PlatformError:
    """Adds what must be refused: quickly, and with nothing of it in the store."""
    before, started_s = entries(store), time.monotonic()
    with pytest.raises(PlatformError) as caught:
        _add(store, source, **fields)
    assert time.monotonic() - started_s < 10
    assert entries(store) == before and not [p for p in store.glob(".add-*") if p.is_dir()]
    return caught.value


def test_a_folder_becomes_a_whole_model_in_bf16_and_packed(store: Path, folder: Path) -> None:
    added = _add(store, folder)
    manifest = Manifest.load(store / "tiny-llama")
    manifest.verify()
    assert (added.manifest, added.is_new, manifest.kind) == (manifest, True, "llm")
    assert formats_of(manifest) == ["bf16", "int4"]
    assert manifest.config["source_dtype"] == "F32" and manifest.config["eos_token_ids"] == [256]
    assert manifest.source["files"]["model.safetensors"] == sha256_of(folder / "model.safetensors")
    assert (store / "tiny-llama" / "chat_template.jinja").read_text() == tiny.TEMPLATE
    assert "chat_template" not in json.loads((store / "tiny-llama" / "tokenizer_config.json").read_text())
    mine, theirs = TensorFile(manifest.path("model.safetensors")), TensorFile(folder / "model.safetensors")
    for name in theirs.entries:
        np.testing.assert_allclose(mine.float32(name), theirs.float32(name), rtol=2**-8, atol=0)
    packed = TensorFile(manifest.path("model.int4.safetensors"))
    down = unpack_matrix(packed.raw("layers.1.down"), "int4", 64)
    np.testing.assert_allclose(down, theirs.float32("model.layers.1.mlp.down_proj.weight"), atol=0.02)


def test_weights_in_parts_give_the_same_as_in_one(store: Path, folder: Path) -> None:
    whole = _add(store, folder).manifest
    claims = tiny.claims()
    names = sorted(claims)
    for number, part in enumerate((names[:9], names[9:]), 1):
        target = folder / f"model-{number:05}-of-00002.safetensors"
        write_tensors(target, {name: claims[name] for name in part}, {})
    (folder / "model.safetensors").unlink()
    parts = _add(store, folder, model_id="parts").manifest
    assert parts.weights_sha256 == whole.weights_sha256
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "1 of 2 parts" in _refused(store, folder, model_id="third").message


def test_weights_that_are_bf16_already_keep_their_sum(store: Path, folder: Path) -> None:
    standing = _add(store, folder).manifest
    copy = tiny.write(folder.parent / "copy")
    (copy / "model.safetensors").write_bytes(standing.path("model.safetensors").read_bytes())
    assert _add(store, copy).manifest.weights_sha256 == standing.weights_sha256


def test_the_same_files_again_change_nothing_and_other_files_are_refused(store: Path, folder: Path) -> None:
    version = _add(store, folder).manifest.version
    again = _add(store, folder)
    assert (again.is_new, again.manifest.version) == (False, version)
    tiny.write(folder, seed=6)
    error = _refused(store, folder)
    assert error.code is Code.CONFLICT and "models remove tiny-llama" in error.message
    remove(store, "tiny-llama")
    assert _add(store, folder).is_new


def test_one_more_format_is_packed_beside_the_others(store: Path, folder: Path) -> None:
    first = _add(store, folder, forms=()).manifest
    assert formats_of(first) == ["bf16"]
    second = _add(store, folder, forms=("int8",)).manifest
    assert formats_of(_add(store, folder, forms=("int4",)).manifest) == ["bf16", "int4", "int8"]
    assert second.weights_sha256 == first.weights_sha256 and second.config["earlier_versions"] == [first.version]


def test_sums_known_beforehand_are_held_against_the_files(store: Path, folder: Path, tmp_path: Path) -> None:
    right = sha256_of(folder / "model.safetensors")
    error = _refused(store, folder, pins=read_pins([f"model.safetensors={'0' * 64}"]))
    assert error.code is Code.DATA_LOSS and right in error.message and "0" * 64 in error.message
    assert _refused(store, folder, pins={"other.safetensors": right}).code is Code.INVALID_ARGUMENT
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{right}  model.safetensors\n")
    notes = _add(store, folder, pins=read_pins([str(sums)])).notes
    assert notes[0] == "verified against the sums that you gave: model.safetensors"
    assert "config.json" in notes[1] and "trusted" in notes[1]
    with pytest.raises(PlatformError, match="no sha256"):
        read_pins(["model.safetensors=abc"])


def test_pickles_are_never_opened_and_refused_where_there_is_nothing_else(store: Path, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (folder / "modeling.py").write_text("raise SystemExit")
    assert "never opened: modeling.py, pytorch_model.bin" in _add(store, folder).notes
    (folder / "model.safetensors").unlink()
    error = _refused(store, folder, model_id="pickled")
    assert error.code is Code.INVALID_ARGUMENT and "pytorch_model.bin" in error.message
    assert _refused(store, folder / "pytorch_model.bin").code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, Code.INVALID_ARGUMENT, "auto_map"),
        ({"model_type": "mamba"}, Code.FAILED_PRECONDITION, "mamba"),
        ({"quantization_config": {"bits": 4}}, Code.FAILED_PRECONDITION, "quantised"),
        ({"rope_scaling": {"rope_type": "llama3"}}, Code.FAILED_PRECONDITION, "llama3"),
        ({"attention_bias": True}, Code.FAILED_PRECONDITION, "biases"),
        ({"hidden_size": None}, Code.INVALID_ARGUMENT, "hidden_size"),
        ({"num_hidden_layers": 2**63}, Code.INVALID_ARGUMENT, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, Code.DATA_LOSS, "9 of 30 tensors are missing"),
        ({"num_hidden_layers": 1}, Code.INVALID_ARGUMENT, "none of a Llama's"),
        ({"intermediate_size": 128}, Code.DATA_LOSS, "shape"),
        ({"vocab_size": 128}, Code.DATA_LOSS, "shape"),
        ({"eos_token_id": "two"}, Code.INVALID_ARGUMENT, "eos_token_id"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused(
    store: Path, folder: Path, changes: dict[str, Any], code: Code, word: str
) -> None:
    error = _refused(store, tiny.write(folder, **changes))
    assert error.code is code and word in error.message


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
LIES = {
    "empty": b"",
    "cut in its header": tiny.header({"a": ENTRY})[:20],
    "cut in its data": tiny.header({"a": ENTRY}, b"\0" * 15),
    "too long": tiny.header({"a": ENTRY}, b"\0" * 17),
    "2^63 bytes of header": tiny.header({}, length=2**63),
    "2^64 - 1 bytes of header": tiny.header({}, length=2**64 - 1),
    "overlap": tiny.header({"a": ENTRY, "b": ENTRY}, b"\0" * 16),
    "out of range": tiny.header({"a": ENTRY | {"data_offsets": [2**62, 2**62 + 16]}}, b"\0" * 16),
    "negative": tiny.header({"a": ENTRY | {"data_offsets": [-16, 0]}}, b"\0" * 16),
    "shape of 2^80 numbers": tiny.header({"a": ENTRY | {"shape": [2**40, 2**40]}}, b"\0" * 16),
    "unknown type": tiny.header({"a": ENTRY | {"dtype": "Q7"}}, b"\0" * 16),
    "type of a list": tiny.header({"a": ENTRY | {"dtype": []}}, b"\0" * 16),
    "no entry": tiny.header({"a": 3}, b"\0" * 16),
    "metadata of a number": tiny.header({"__metadata__": 3, "a": ENTRY}, b"\0" * 16),
    "deeply nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_found_before_its_claims_are_used(store: Path, folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert _refused(store, folder).code is Code.DATA_LOSS


def test_numbers_that_are_not_finite_and_types_that_are_no_floats_are_damage(store: Path, folder: Path) -> None:
    name, claims = "model.layers.1.mlp.up_proj.weight", tiny.claims()
    sick = np.full((96, 64), np.nan, dtype=np.float32)
    for claim in (
        TensorClaim("F32", (96, 64), lambda: sick),
        TensorClaim("I32", (96, 64), lambda: sick.view(np.int32)),
    ):
        write_tensors(folder / "model.safetensors", claims | {name: claim}, {})
        error = _refused(store, folder)
        assert error.code is Code.DATA_LOSS and name in error.message


def test_other_tokenizers_and_templates_that_reach_out_are_refused(store: Path, folder: Path) -> None:
    named = {"eos_token": "<|end|>", "chat_template": "{{ ''.__class__ }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    assert _refused(store, folder).reason == "unsafe_template"
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__ }}")
    assert _refused(store, folder).reason == "unsafe_template"
    (folder / "tokenizer.json").write_text('{"decoder": {"type": "WordPiece"}}')
    assert "byte-level" in _refused(store, folder).message
    (folder / "tokenizer.json").write_text('{"decoder": {"type": "ByteLevel"}, "model": 3}')
    assert _refused(store, folder).code is Code.INVALID_ARGUMENT
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in _refused(store, folder).message


@pytest.mark.parametrize("model_id", ["..", "a/b", "adapters", "smollm2-135m-instruct", "x" * 97, ".hidden"])
def test_ids_that_lead_astray_are_refused(store: Path, folder: Path, model_id: str) -> None:
    assert _refused(store, folder, model_id=model_id).param == "id"


ADD = "import sys; from pathlib import Path; from modelstore.adding import Order, add; "
SLOW = ADD + (
    "import time\n"
    "def step(name, done, total):\n"
    "    print(name, flush=True)\n"
    "    time.sleep(60 if name == sys.argv[3] else 0)\n"
    "add(Path(sys.argv[1]), Order(sys.argv[2]), step)"
)


@pytest.mark.parametrize("step", ["check sums", "convert", "pack int4", "write"])
def test_a_run_that_is_killed_leaves_no_half_model_and_the_next_one_makes_it(
    store: Path, folder: Path, step: str
) -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW, str(store), str(folder), step], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        while run.stdout.readline().strip() != step.encode():
            pass
        run.send_signal(signal.SIGKILL)
    assert entries(store) == []
    _add(store, folder).manifest.verify()
    assert [entry.id for entry in entries(store)] == ["tiny-llama"]
    assert not [path for path in store.iterdir() if path.name.startswith(".") and path.is_dir()]


def test_a_second_add_of_the_same_model_waits_and_then_finds_it(store: Path, folder: Path) -> None:
    steps: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(store), str(folder), "convert"], stdout=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        while run.stdout.readline().strip() != b"convert":
            pass
        second = threading.Thread(target=add, args=(store, Order(str(folder)), lambda step, *_: steps.append(step)))
        second.start()
        eventually_sync(lambda: steps == ["wait for another add"])
        run.send_signal(signal.SIGKILL)
    second.join(60)
    assert not second.is_alive() and [entry.id for entry in entries(store)] == ["tiny-llama"]


def test_a_base_with_adapters_and_the_adapters_themselves_stay_unless_forced(store: Path, folder: Path) -> None:
    _add(store, folder)
    adapter = store / "adapters" / "job-1"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"a")
    config = {"base": "tiny-llama"}
    write_manifest(adapter, model_id="tiny-llama:mine", kind="adapter", created_unix_s=1, source={}, config=config)
    for model_id in ("tiny-llama", "tiny-llama:mine"):
        with pytest.raises(PlatformError, match="tiny-llama:mine") as caught:
            remove(store, model_id)
        assert caught.value.code is Code.FAILED_PRECONDITION
    remove(store, "tiny-llama", force=True)
    assert [entry.id for entry in entries(store)] == ["tiny-llama:mine"]
    with pytest.raises(PlatformError) as caught:
        remove(store, "tiny-llama")
    assert caught.value.code is Code.NOT_FOUND


def test_a_damaged_model_is_listed_with_its_problem_and_can_be_made_again(store: Path, folder: Path) -> None:
    manifest = _add(store, folder).manifest
    path = manifest.path("model.int4.safetensors")
    os.truncate(path, 100)
    notes = _add(store, folder).notes
    assert "made again" in notes[0] and "model.int4.safetensors" in notes[0]
    Manifest.load(store / "tiny-llama").verify()
    (store / "tiny-llama" / "manifest.json").write_text("{")
    (entry,) = entries(store)
    assert entry.manifest is None and "damaged" in entry.problem
    remove(store, "tiny-llama")
    assert entries(store) == []
