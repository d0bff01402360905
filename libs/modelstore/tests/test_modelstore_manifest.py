import json
import subprocess
import sys
from pathlib import Path

import pytest

from chassis.errors import Code, PlatformError
from modelstore import Manifest
from modelstore.manifest import sha256_of, write_manifest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "config.json").write_text("{}")
    source = {"package": "p", "version": "1", "file": "f", "sha256": "0" * 64}
    write_manifest(folder, model_id="tiny", kind="encoder", created_unix_s=7, source=source, config={"dimensions": 4})
    return folder


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_model_is_verified_and_its_version_is_the_manifests_sum(model: Path) -> None:
    manifest = Manifest.load(model)
    manifest.verify()
    assert (manifest.id, manifest.kind, manifest.created_unix_s) == ("tiny", "encoder", 7)
    assert manifest.version == sha256_of(model / "manifest.json")[:12]
    assert manifest.path("weights.bin").read_bytes()[:2] == b"\0\1"


def test_one_changed_byte_is_data_loss_with_the_file_and_both_sums(model: Path) -> None:
    expected = sha256_of(model / "weights.bin")
    content = bytearray((model / "weights.bin").read_bytes())
    content[1000] ^= 1
    (model / "weights.bin").write_bytes(content)
    with pytest.raises(PlatformError) as caught:
        Manifest.load(model).verify()
    assert caught.value.code is Code.DATA_LOSS
    for part in ("tiny", "weights.bin", expected, sha256_of(model / "weights.bin")):
        assert part in caught.value.message


def test_a_file_cut_short_is_data_loss(model: Path) -> None:
    (model / "weights.bin").write_bytes((model / "weights.bin").read_bytes()[:-1])
    with pytest.raises(PlatformError, match=r"2048 bytes.*2047 bytes"):
        Manifest.load(model).verify()


def test_a_missing_file_is_data_loss_with_the_expected_sum(model: Path) -> None:
    (model / "weights.bin").unlink()
    with pytest.raises(PlatformError, match=r"weights\.bin is missing.*expected sha256 [0-9a-f]{64}") as caught:
        Manifest.load(model).verify()
    assert caught.value.code is Code.DATA_LOSS


def test_a_manifest_cut_anywhere_is_data_loss(model: Path) -> None:
    whole = (model / "manifest.json").read_bytes().rstrip()
    for length in range(len(whole)):
        (model / "manifest.json").write_bytes(whole[:length])
        with pytest.raises(PlatformError) as caught:
            Manifest.load(model)
        assert caught.value.code is Code.DATA_LOSS


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b"{}", b"null", b"[" * 100_000, b" " * (1024 * 1024 + 1)])
def test_a_manifest_that_is_something_else_is_data_loss(model: Path, content: bytes) -> None:
    (model / "manifest.json").write_bytes(content)
    with pytest.raises(PlatformError) as caught:
        Manifest.load(model)
    assert caught.value.code is Code.DATA_LOSS


def test_a_folder_without_manifest_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="prepare the model store") as caught:
        Manifest.load(tmp_path)
    assert caught.value.code is Code.NOT_FOUND


@pytest.mark.parametrize(
    "path", ["../weights.bin", "/etc/hostname", "a/../../b", "a/..", "", ".", "./x", "a//b", "a\\b"]
)
def test_a_path_that_leaves_the_folder_is_refused(model: Path, path: str) -> None:
    _edit(model, files=[{"path": path, "sha256": "0" * 64, "size_bytes": 1}])
    with pytest.raises(PlatformError, match="not a plain path") as caught:
        Manifest.load(model)
    assert caught.value.code is Code.DATA_LOSS


@pytest.mark.parametrize("link", ["weights.bin", "folder/weights.bin"])
def test_a_symlink_that_leaves_the_folder_is_refused_though_the_sum_is_right(
    model: Path, tmp_path: Path, link: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (model / "weights.bin").rename(outside / "weights.bin")
    entry = model / link.split("/")[0]
    entry.symlink_to(outside if "/" in link else outside / "weights.bin")
    sums = {"sha256": sha256_of(outside / "weights.bin"), "size_bytes": 2048}
    _edit(model, files=[{"path": link, **sums}])
    manifest = Manifest.load(model)
    for attempt in (manifest.verify, lambda: manifest.path(link)):
        with pytest.raises(PlatformError, match="leads out of the model's folder") as caught:
            attempt()
        assert caught.value.code is Code.DATA_LOSS


def test_the_models_folder_itself_may_be_a_symlink(model: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(model)
    Manifest.load(tmp_path / "current").verify()


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": [{"path": "a", "sha256": "0" * 63, "size_bytes": 1}]},
        {"files": [{"path": "a", "sha256": "0" * 64, "size_bytes": -1}]},
        {"files": [{"path": "a", "sha256": "0" * 64, "size_bytes": 1}] * 2},
        {"files": [{"path": "a", "sha256": "0" * 64}]},
        {"kind": "poem"},
        {"id": 4},
        {"created_unix_s": True},
        {"config": None},
    ],
)
def test_a_manifest_with_a_wrong_field_is_data_loss(model: Path, change: dict[str, object]) -> None:
    _edit(model, **change)
    with pytest.raises(PlatformError) as caught:
        Manifest.load(model)
    assert caught.value.code is Code.DATA_LOSS


def test_a_file_that_is_not_listed_is_not_handed_out(model: Path) -> None:
    (model / "extra.bin").write_bytes(b"x")
    with pytest.raises(PlatformError, match="lists no file"):
        Manifest.load(model).path("extra.bin")


def test_importing_the_manifest_imports_nothing_heavy() -> None:
    code = "import sys, modelstore; print([m for m in ('torch', 'transformers', 'numpy', 'onnx') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
