"""The protos are the law: linted, commented, never broken, and the generated code is theirs."""

import filecmp
import os
import pathlib
import subprocess
import sys
import sysconfig

import pytest

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


def _git(*arguments) -> str | None:
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode(errors="replace").strip()


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
    """Against where this branch left main, or, on main, against the first commit: v1 stays v1."""
    head, base = _git("rev-parse", "HEAD"), _git("merge-base", "HEAD", "origin/main")
    if base is None or base == head:
        base = ((_git("rev-list", "--max-parents=0", "HEAD") or "").splitlines() or [None])[-1]
    if base is None:
        pytest.skip("no git history here to compare with")
    if not _git("ls-tree", "--name-only", base, "proto/"):
        pytest.skip(f"commit {base[:12]} has no proto/")
    before = tmp_path / "before"
    before.mkdir()
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", base, "proto"], capture_output=True, check=True, timeout=60
    ).stdout
    subprocess.run(["tar", "-x", "-C", before], input=archive, check=True, timeout=60)
    done = _buf(tmp_path, "breaking", "proto", "--against", before / "proto")
    assert done.returncode == 0, done.stdout + done.stderr
