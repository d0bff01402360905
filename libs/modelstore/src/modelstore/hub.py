"""Fetches the files of one model from a hub that speaks Hugging Face's HTTP API, with resume and with sums.

Two of its routes, and no library: that one reads its settings when it is imported (HF_HUB_OFFLINE among them), waits
for minutes where there is no network, and keeps a cache of its own.
"""

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from chassis.errors import Code, PlatformError
from modelstore.manifest import sha256_of

if TYPE_CHECKING:
    import httpx

DEFAULT_ENDPOINT = "https://huggingface.co"
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_CONNECT_S, _READ_S = 5.0, 30.0
_MAX_LISTING_BYTES = 16 * 1024 * 1024
_MAX_ATTEMPTS = 5  # in a row without one new byte
_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub announces it: large ones with their sha256, small ones with git's sha1."""

    name: str
    size_bytes: int
    sha256: str
    git_sha1: str


@dataclass(frozen=True, slots=True)
class HubModel:
    """One commit of a repository. `files` are those that lie at its top."""

    repository: str
    commit: str
    files: tuple[HubFile, ...]

    def file(self, name: str) -> HubFile:
        """Returns an announced file."""
        return next(file for file in self.files if file.name == name)


class Hub:
    """A client; use it as a context. Raises PlatformError: UNAVAILABLE, NOT_FOUND, PERMISSION_DENIED, DATA_LOSS."""

    def __init__(self, endpoint: str, token: str = "") -> None:
        import httpx

        self._endpoint = endpoint.rstrip("/")
        headers = {"authorization": f"Bearer {token}"} if token else {}
        timeout = httpx.Timeout(_READ_S, connect=_CONNECT_S)
        # httpx drops the token where a redirect leads to another host, as that to the files' store does.
        self._client = httpx.Client(headers=headers, timeout=timeout, follow_redirects=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def look_up(self, repository: str, revision: str) -> HubModel:
        """Returns what a repository holds at a branch, tag or commit."""
        url = f"{self._endpoint}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
        import httpx

        try:
            with self._client.stream("GET", url) as response:
                self._check(response, f"{repository}@{revision}")
                raw = b""
                for block in response.iter_bytes():
                    raw += block
                    if len(raw) > _MAX_LISTING_BYTES:
                        raise _lied(self._endpoint, "its answer is too long")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        return _parse(self._endpoint, repository, raw)

    def fetch(self, model: HubModel, file: HubFile, folder: Path, progress: Callable[[int], None]) -> None:
        """Brings a file into `folder` under its name, going on with what an earlier run left; tells bytes so far."""
        path, part = folder / file.name, folder / f"{file.name}.part"
        if path.exists():
            progress(file.size_bytes)
            return
        num_tries = 0
        while (have := part.stat().st_size if part.exists() else 0) < file.size_bytes or not part.exists():
            num_tries = self._go_on(model, file, part, have, num_tries, progress)
        _verify(file, part)
        part.rename(path)
        progress(file.size_bytes)

    def _go_on(
        self,
        model: HubModel,
        file: HubFile,
        part: Path,
        have: int,
        num_tries: int,
        progress: Callable[[int], None],
    ) -> int:
        """Reads as far as the connection lasts; returns the tries in a row that brought nothing."""
        import httpx

        try:
            self._read(model, file, part, have, progress)
            if part.stat().st_size >= file.size_bytes:
                return 0
            error: Exception = EOFError("the connection ended early")
        except httpx.HTTPError as caught:
            error = caught
        num_tries = 1 if part.exists() and part.stat().st_size > have else num_tries + 1
        if num_tries >= _MAX_ATTEMPTS or isinstance(error, httpx.ConnectError):
            raise self._unreachable(error) from error
        time.sleep(_PAUSE_S * num_tries)
        return num_tries

    def _read(self, model: HubModel, file: HubFile, part: Path, have: int, progress: Callable[[int], None]) -> None:
        url = f"{self._endpoint}/{model.repository}/resolve/{model.commit}/{quote(file.name)}"
        headers = {"accept-encoding": "identity"} | ({"range": f"bytes={have}-"} if have else {})
        with self._client.stream("GET", url, headers=headers) as response:
            self._check(response, f"{model.repository}/{file.name}")
            goes_on = response.status_code == 206 and response.headers.get("content-range", "").startswith(
                f"bytes {have}-"
            )
            size_bytes = have if goes_on else 0
            with part.open("ab" if goes_on else "wb") as target:
                for block in response.iter_raw():  # of no fixed size: what is short of it would be lost
                    size_bytes += len(block)
                    if size_bytes > file.size_bytes:
                        part.unlink()
                        raise _lied(self._endpoint, f"{file.name} is longer than the {file.size_bytes} bytes announced")
                    target.write(block)
                    progress(size_bytes)

    def _check(self, response: "httpx.Response", what: str) -> None:
        status = response.status_code
        if status in (401, 403):
            message = f"the hub does not give {what} (HTTP {status}): it is not there, or wants a token in HF_TOKEN"
            raise PlatformError(Code.PERMISSION_DENIED, message)
        if status == 404:
            raise PlatformError(Code.NOT_FOUND, f"there is no {what} at {self._endpoint}")
        if status >= 400:
            raise PlatformError(Code.UNAVAILABLE, f"the hub {self._endpoint} answered HTTP {status} for {what}")

    def _unreachable(self, error: Exception) -> PlatformError:
        why = str(error) or type(error).__name__
        message = f"the hub {self._endpoint} cannot be reached ({why}); what was fetched is kept: run it again"
        return PlatformError(Code.UNAVAILABLE, message)


def _parse(endpoint: str, repository: str, raw: bytes) -> HubModel:
    import json

    try:
        document: dict[str, Any] = json.loads(raw)
        commit = document["sha"]
        files = []
        for sibling in document["siblings"]:
            lfs = sibling.get("lfs") or {}
            size_bytes = lfs.get("size", sibling.get("size"))
            if "/" in sibling["rfilename"] or type(size_bytes) is not int:
                continue
            sums = str(lfs.get("sha256", "")), "" if lfs else str(sibling.get("blobId") or "")
            files.append(HubFile(sibling["rfilename"], size_bytes, *sums))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _lied(endpoint, f"its answer is not a model's ({error!r})") from error
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise _lied(endpoint, f"its commit is {str(commit)[:80]!r}")
    return HubModel(repository, commit, tuple(files))


def _verify(file: HubFile, path: Path) -> None:
    """Compares with the announced sum. A file that differs goes: the next run begins it anew."""
    if file.sha256:
        expected, found = file.sha256, sha256_of(path)
    elif file.git_sha1:
        expected = file.git_sha1
        found = hashlib.sha1(
            f"blob {file.size_bytes}\0".encode() + path.read_bytes(), usedforsecurity=False
        ).hexdigest()
    else:
        return
    if found != expected:
        path.unlink()
        raise PlatformError(
            Code.DATA_LOSS, f"checksum mismatch in {file.name} from the hub: expected {expected}, found {found}"
        )


def _lied(endpoint: str, why: str) -> PlatformError:
    return PlatformError(Code.DATA_LOSS, f"the hub {endpoint} cannot be believed: {why}")
