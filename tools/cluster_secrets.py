#!/usr/bin/env python3
"""Makes the secrets that an overlay of k8s/ is rendered with: k8s/overlays/NAME/secrets/*.env, mode 0600, not in git.

usage: python3 tools/cluster_secrets.py OVERLAY [--milvus-uri URI]      (standard library alone)

Values that are there are kept: a new password would lock the services out of what they wrote, and a new pepper every
client. To change one, edit its file and apply again; the pods that read it are replaced.
"""

import argparse
import pathlib
import secrets
import sys
from collections.abc import Callable, Mapping

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "libs" / "devstack" / "src"))

from devstack.home import new_key, read_pairs, write_private  # noqa: E402


def _password() -> str:
    return secrets.token_hex(24)  # hexadecimal: it stands in URLs


MADE: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "nats": {"NATS_PASSWORD": _password},
    "valkey": {"VALKEY_PASSWORD": _password},
    "gateway": {"KEY_PEPPER": _password, "PRESSROOM_API_KEY": new_key, "PRESSROOM_ADMIN_KEY": new_key},
}


def main(arguments: list[str] | None = None) -> int:
    """Writes the files; says where they are and nothing of what is in them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overlay", help="folder below k8s/overlays: dev, prod")
    parser.add_argument("--milvus-uri", help="where a Milvus outside listens, with user and password in it")
    told = parser.parse_args(arguments)
    overlay = ROOT / "k8s" / "overlays" / told.overlay
    if not (overlay / "kustomization.yaml").is_file():
        print(f"there is no overlay k8s/overlays/{told.overlay}", file=sys.stderr)
        return 1
    folder = overlay / "secrets"
    needs_milvus = "secrets/milvus.env" in (overlay / "kustomization.yaml").read_text()
    if needs_milvus and not (told.milvus_uri or read_pairs(folder / "milvus.env")):
        print(f"{told.overlay} has a Milvus of its own: say where with --milvus-uri", file=sys.stderr)
        return 1
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, makers in MADE.items():
        had = read_pairs(folder / f"{name}.env")
        _write(folder / f"{name}.env", {key: had.get(key) or make() for key, make in makers.items()})
    if needs_milvus and told.milvus_uri:
        _write(folder / "milvus.env", {"MILVUS_URI": told.milvus_uri})
    shown = overlay.relative_to(ROOT)
    print(f"{shown}/secrets: {len(list(folder.glob('*.env')))} files; kubectl apply -k {shown} goes on from here")
    return 0


def _write(path: pathlib.Path, pairs: Mapping[str, str]) -> None:
    write_private(path, "".join(f"{key}={value}\n" for key, value in pairs.items()))


if __name__ == "__main__":
    sys.exit(main())
