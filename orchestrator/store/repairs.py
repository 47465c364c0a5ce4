"""Files that several states name: made again once, and put back where all of them look for it.

`repairs/<key>.json` lists the weights' files of an artifact that was discarded as damaged. What is committed under its
key afterwards lies where they lay as far as it has the same bytes, and every other manifest that names them is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.errors import StoreError
from orchestrator.store.manifest import KEPT, Blob, Manifest
from orchestrator.store.objects import Objects

FOLDER = "repairs"
# Of a state's files other states name these alone.
_SHARED = "weights"


def owner_of(blob: Blob) -> str:
    """Return the state that a file was written for: of a kept one an earlier state than the one that names it."""
    return blob.name.partition("/")[0].removeprefix(KEPT) if blob.name.startswith(KEPT) else blob.artifact


class Repairs:
    """What is to be put back in one store; `damage` tells what is wrong with a file, "" if nothing is."""

    def __init__(self, objects: Objects, damage: Callable[[Blob], str]) -> None:
        self._objects = objects
        self._damage = damage

    def expect(self, manifest: Manifest, committed: float) -> None:
        """Write down where the weights of an artifact lay that is about to be discarded; it was `committed` then."""
        files = [(b.name, b.path, b.size, b.sha256) for b in manifest.blobs if b.name.startswith(_SHARED)]
        if files:
            self._objects.put(_path(manifest.key), json.dumps({"committed": committed, "files": files}).encode())

    def expected(self, key: str) -> Sequence[Blob]:
        """Return the files that are put back when `key` is made again."""
        return self._read(key)[0]

    def put_back(self, manifest: Manifest) -> Manifest:
        """Return a manifest made again with its files where equal ones lay: what is damaged there is replaced."""
        former, committed = self._read(manifest.key)
        places = {(one.name, one.size, one.sha256): one for one in former}

        def placed(blob: Blob) -> Blob:
            place = places.get((blob.name, blob.size, blob.sha256))
            if place is None or (self._damage(place) and not self._copied(blob, place, committed)):
                return blob
            return replace(blob, path=place.path)

        return replace(manifest, blobs=tuple(map(placed, manifest.blobs))) if places else manifest

    def done(self, key: str) -> None:
        """Forget what was expected of `key`: it is committed."""
        self._objects.delete(_path(key))

    def awaited(self) -> dict[str, set[str]]:
        """Return key -> the places to which its files are put back."""
        keys = [entry.path.rsplit("/", 1)[-1].removesuffix(".json") for entry in self._objects.list(FOLDER)]
        return {key: {blob.path for blob in self.expected(key)} for key in keys}

    def _copied(self, blob: Blob, place: Blob, committed: float) -> bool:
        """Replace a damaged file by one that was just written; False if that is no longer what it should be."""
        with contextlib.ExitStack() as stack:
            source = self._objects.local_path(blob.path) or self._fetched(blob, stack)
            self._objects.delete(place.path)
            # Another process of the same repair may have put it there first.
            with contextlib.suppress(StoreError):
                self._objects.upload(place.path, source)
        if self._damage(place):
            return False
        if (file_path := self._objects.local_path(place.path)) is not None:
            os.utime(file_path, (committed, committed))  # what is newer than the manifests that name it looks altered
        return True

    def _fetched(self, blob: Blob, stack: contextlib.ExitStack) -> Path:
        """Return a copy of a bucket's file that is there as long as `stack`."""
        try:
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "file"
            with copy.open("wb") as file:
                for chunk in self._objects.chunks(blob.path) or ():
                    file.write(chunk)
        except OSError as error:
            hint = "free some space in its temporary folder, or set TMPDIR to another one"
            raise StoreError(f"cannot copy {blob.path} to this machine", cause=str(error), hint=hint) from error
        return copy

    def _read(self, key: str) -> tuple[list[Blob], float]:
        data = self._objects.get(_path(key))
        try:
            document = json.loads(data or b"{}")
            files = [Blob(name, path, size, sha256, key) for name, path, size, sha256 in document.get("files", ())]
            return files, float(document.get("committed", 0.0))
        except (ValueError, TypeError, AttributeError):
            return [], 0.0  # damaged: everything is made again


def _path(key: str) -> str:
    return f"{FOLDER}/{key}.json"
