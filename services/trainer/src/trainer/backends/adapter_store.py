"""Adapters in the model store, in `<store>/adapters/<job_id>/`, whole or not there. Implements core.ports.Adapters."""

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chassis.errors import PlatformError
from modelstore import Manifest
from modelstore.manifest import MANIFEST_NAME, sha256_of, write_manifest
from trainer.backends import run_files
from trainer.backends.durable_files import remove_tree, sync_folder, sync_tree, write_synced
from trainer.core.ports import RunFolder
from trainer.core.runs import Adapter, TrainOrder, check_job_id

log = logging.getLogger(__name__)

FOLDER = "adapters"


class AdapterStore:
    """Writes and lists adapters. The folder of an adapter never changes once it stands under its name."""

    def __init__(self, store_dir: Path) -> None:
        self._adapters = store_dir / FOLDER

    def find(self, order: TrainOrder) -> Adapter | None:
        folder = self._adapters / check_job_id(order.job_id)
        if not folder.is_dir():
            return None
        found = _read(folder)
        return found if found is not None and found.id == order.fine_tuned_model else None

    def publish(self, order: TrainOrder, folder: RunFolder, made: Mapping[str, Any]) -> Adapter:
        """`made`: what the child told of the adapter, and the run's figures."""
        self._adapters.mkdir(parents=True, exist_ok=True)
        target = self._adapters / check_job_id(order.job_id)
        beside = self._adapters / f".{order.job_id}.beside"
        remove_tree(beside)
        try:
            beside.mkdir()
            for path in (folder.path / run_files.ADAPTER).iterdir():
                write_synced(beside / path.name, path.read_bytes())
            write_manifest(
                beside,
                model_id=order.fine_tuned_model,
                kind="adapter",
                created_unix_s=int(time.time()),
                source={
                    "training_file_id": order.file_id,
                    "training_file_sha256": order.file_sha256,
                    "seed": order.seed,
                    "plan": made["plan"],
                    "trained_tokens": made["trained_tokens"],
                    "final_loss": made["final_loss"],
                },
                config={
                    "base": order.model,
                    "base_version": made["base_version"],
                    "base_weights_sha256": made["base_weights_sha256"],
                    "tenant": order.tenant,
                    "job_id": order.job_id,
                    "rank": made["rank"],
                    "alpha": made["alpha"],
                    "target_modules": made["target_modules"],
                },
            )
            sync_tree(beside)
            remove_tree(target)  # of another order with the job's name: never seen, but never mixed either
            os.replace(beside, target)
        except OSError:
            with contextlib.suppress(OSError):
                remove_tree(beside)
            raise
        sync_folder(self._adapters)
        published = _read(target)
        assert published is not None
        return published

    def remove(self, job_id: str) -> None:
        for name in (job_id, f".{check_job_id(job_id)}.beside"):
            remove_tree(self._adapters / name)

    def versions(self, base: str) -> list[Adapter]:
        if not self._adapters.is_dir():
            return []
        found = [_read(path) for path in self._adapters.iterdir() if path.is_dir() and not path.name.startswith(".")]
        kept = [adapter for adapter in found if adapter is not None and base in ("", adapter.base)]
        return sorted(kept, key=lambda adapter: (adapter.created_unix_s, adapter.job_id), reverse=True)


def _read(folder: Path) -> Adapter | None:
    """Returns what a folder's manifest says; None, and a line in the log, where it says nothing usable."""
    try:
        manifest = Manifest.load(folder)
        return Adapter(
            id=manifest.id,
            base=str(manifest.config["base"]),
            path=f"{FOLDER}/{folder.name}",
            manifest_sha256=sha256_of(folder / MANIFEST_NAME),
            job_id=str(manifest.config["job_id"]),
            tenant=str(manifest.config["tenant"]),
            created_unix_s=manifest.created_unix_s,
            trained_tokens=int(manifest.source.get("trained_tokens", 0)),
            final_loss=float(manifest.source.get("final_loss", 0.0)),
        )
    except (PlatformError, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("an adapter of the store cannot be read", extra={"folder": folder.name, "error": repr(error)})
        return None
