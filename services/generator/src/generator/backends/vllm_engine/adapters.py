"""Adapters on their way to vLLM, which loads them from a folder that it sees at the same path as we do."""

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, deserialize

from chassis.errors import Code, PlatformError
from generator.backends.vllm_engine.client import VllmClient
from generator.core.adapters import AdapterFiles, AdapterSpec


@dataclass(frozen=True, slots=True)
class VllmAdapter:
    """See core.adapters.AdapterWeights. `name` is what vLLM knows it by: two versions of an id may be there at once."""

    name: str
    folder: Path
    size_bytes: int


class AdapterFolder:
    """Hands adapters to vLLM and takes them back."""

    def __init__(self, client: VllmClient, folder: Path) -> None:
        self._client = client
        self._folder = folder

    def locate(self, spec: AdapterSpec, size_bytes: int = 0) -> VllmAdapter:
        """Says what an adapter is called at vLLM and where its files go; does nothing."""
        return VllmAdapter(f"{spec.id}@{spec.version}", self._folder / spec.manifest_sha256, size_bytes)

    async def load(self, files: AdapterFiles) -> None:
        """Has vLLM load an adapter. Raises DATA_LOSS for a damaged file, INVALID_ARGUMENT for what vLLM refuses."""
        adapter = self.locate(files.spec)
        await asyncio.to_thread(_write, adapter.folder, files)
        await self._client.load_adapter(adapter.name, str(adapter.folder))

    async def load_again(self, adapter: VllmAdapter) -> None:
        """Has a vLLM that was started anew load what is in the folder still."""
        await self._client.load_adapter(adapter.name, str(adapter.folder))

    async def unload(self, adapter: VllmAdapter) -> None:
        """Has vLLM forget an adapter, and removes its files. Harmless where that was done before."""
        try:
            await self._client.unload_adapter(adapter.name)
        finally:
            await asyncio.to_thread(shutil.rmtree, adapter.folder, ignore_errors=True)


def check_whole(files: AdapterFiles) -> None:
    """Raises PlatformError(DATA_LOSS) unless its tensors can be read.

    vLLM's own error for a file that is not whole does not tell it from one that it does not support."""
    try:
        deserialize(files.tensors)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        message = f"adapter {files.spec.id!r}: its tensors cannot be read: {error}"
        raise PlatformError(Code.DATA_LOSS, message, reason="adapter_damaged") from error


def _write(folder: Path, files: AdapterFiles) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_bytes(files.config)
    (folder / "adapter_model.safetensors").write_bytes(files.tensors)
