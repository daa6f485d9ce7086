"""Files that outlive a process: adapters and checkpoints, on any fsspec store.

An artifact is a folder of files and a manifest. The manifest is written last: the artifact exists when its
manifest does, and a half-written one is garbage that nobody reads.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import fsspec.implementations.local

from tunesmith.errors import NotFound

MANIFEST = "manifest.json"
REMOVALS = 100
"""How often a folder is removed that changes meanwhile: a worker that has lost its job soon stops to write."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class NotStored(Exception):
    """An artifact could not be stored, and nothing of it is left; another try may succeed.

    Attributes:
        reason: Why, and what the server's operator can do about it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ArtifactStore:
    """Artifacts below an fsspec URL, by path."""

    def __init__(self, url: str) -> None:
        self._files, self._root = fsspec.core.url_to_fs(url)
        self._local = isinstance(self._files, fsspec.implementations.local.LocalFileSystem)

    def publish(self, path: str, files: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
        """Store an artifact: its files, then the manifest with `about` and the files' hashes.

        Raises:
            NotStored: There is no space left, or the store does not take it.
        """
        try:
            self._publish(self._at(path), files, about)
        except OSError as error:
            with suppress(OSError):
                self.delete(path)
            if error.errno not in _NO_SPACE:
                raise NotStored(f"{error.strerror or error} in {self._root}") from error
            needed = math.ceil(sum(map(len, files.values())) / 1e6) + 1
            raise NotStored(f"no space left on device: free {needed} MB in {self._root}") from error

    def _publish(self, folder: str, files: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
        self._files.makedirs(folder, exist_ok=True)
        for name, content in files.items():
            self._write(f"{folder}/{name}", content)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        manifest = json.dumps({**about, "files": hashes}, indent=2).encode()
        # A rename is atomic where a write is not.
        self._write(f"{folder}/.{MANIFEST}", manifest)
        self._files.mv(f"{folder}/.{MANIFEST}", f"{folder}/{MANIFEST}")
        if self._local:
            for directory in (folder, str(Path(folder).parent)):
                _sync(directory)

    def _write(self, path: str, content: bytes) -> None:
        self._files.pipe_file(path, content)
        if self._local:
            _sync(path)

    def manifest(self, path: str) -> dict[str, Any]:
        """Return an artifact's manifest.

        Raises:
            NotFound: There is no such artifact, or it was never finished.
        """
        try:
            manifest: dict[str, Any] = json.loads(self._files.cat_file(f"{self._at(path)}/{MANIFEST}"))
        except FileNotFoundError:
            raise NotFound(f"There is no artifact {path}.") from None
        return manifest

    def read(self, path: str) -> dict[str, bytes]:
        """Return an artifact's files, each checked against the hash in the manifest.

        Raises:
            NotFound: There is no such artifact, or a file of it is missing or damaged.
        """
        files: dict[str, bytes] = {}
        for name, sha256 in self.manifest(path)["files"].items():
            try:
                files[name] = self._files.cat_file(f"{self._at(path)}/{name}")
            except FileNotFoundError:
                raise NotFound(f"Artifact {path} lacks its file {name}.") from None
            if hashlib.sha256(files[name]).hexdigest() != sha256:
                raise NotFound(f"File {name} of artifact {path} is damaged: its hash differs.")
        return files

    def children(self, path: str = "") -> list[str]:
        """Return the names below a path; none when the path does not exist."""
        try:
            found = self._files.ls(self._at(path), detail=False)
        except FileNotFoundError:
            return []
        return sorted(Path(name).name for name in found)

    def delete(self, path: str) -> None:
        """Remove an artifact, or a whole folder of them, the manifest first; absent ones are no error."""
        for what in (f"{self._at(path)}/{MANIFEST}", self._at(path)):
            self._remove(what)

    def _remove(self, path: str) -> None:
        """Remove a file or a folder, though another process may add to it or remove from it meanwhile."""
        for _ in range(REMOVALS):
            try:
                self._files.rm(path, recursive=True)
            except FileNotFoundError:  # it is absent, or something in it was when its turn came
                if not self._files.exists(path):
                    return
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
            else:
                return

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")


def _sync(path: str) -> None:
    """Bring a file or a folder to the disk: rows are there when they are committed, and name what must be too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
