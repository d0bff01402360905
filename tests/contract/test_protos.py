"""The protos are the law: linted, commented, never broken, and the generated code is theirs."""

import filecmp
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

from testkit.sources import ROOT

GENERATED = ROOT / "libs" / "contracts" / "src"
BUF = pathlib.Path(sysconfig.get_path("scripts")) / "buf"


def _buf(tmp_path, *arguments):
    return subprocess.run(
        [BUF, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "BUF_CACHE_DIR": str(tmp_path / "buf-cache")},
        capture_output=True,
        text=True,
        timeout=60,
    )


def _files(folder: pathlib.Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_generated_code_is_fresh(tmp_path):
    subprocess.run([sys.executable, ROOT / "tools" / "gen_protos.py", tmp_path], check=True, timeout=60)
    fresh, checked_in = tmp_path / "pressroom", GENERATED / "pressroom"
    assert _files(fresh) == _files(checked_in), "run tools/gen_protos.py"
    assert _files(fresh)
    _, differing, unreadable = filecmp.cmpfiles(fresh, checked_in, _files(fresh), shallow=False)
    assert (differing, unreadable) == ([], []), "run tools/gen_protos.py"


def test_every_proto_passes_lint_and_every_rpc_and_field_is_commented(tmp_path):
    done = _buf(tmp_path, "lint", "proto")
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint_does_find_a_field_without_a_comment(tmp_path):
    """Guards the test above against a configuration that checks nothing."""
    folder = tmp_path / "pressroom" / "x" / "v1"
    folder.mkdir(parents=True)
    (tmp_path / "buf.yaml").write_text((ROOT / "proto" / "buf.yaml").read_text())
    (folder / "x.proto").write_text(
        'syntax = "proto3";\n\npackage pressroom.x.v1;\n\n// Commented.\nmessage M {\n  string bare = 1;\n}\n'
    )
    done = _buf(tmp_path, "lint", tmp_path)
    assert "bare" in done.stdout
    assert "comment" in done.stdout


def test_nothing_that_was_published_is_broken(tmp_path):
    """Against the checked-in image: v1 stays v1. Additions are published with `make protos`."""
    done = _buf(tmp_path, "breaking", "proto", "--against", "proto/published.binpb")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_removed_field_is_found(tmp_path):
    """Guards the test above against an image that says nothing."""
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    path = tmp_path / "proto" / "pressroom" / "common" / "v1" / "common.proto"
    path.write_text(re.sub(r"\n  uint32 cached_tokens = 3;", "", path.read_text()))
    done = _buf(tmp_path, "breaking", tmp_path / "proto", "--against", "proto/published.binpb")
    assert "cached_tokens" in done.stdout
