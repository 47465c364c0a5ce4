"""A compact index of manifests: what commands that show many results read instead of every manifest.

Truth: `artifacts/<key>.json`. The index holds what was read there, with size and time of the manifest it was read
from: a row counts only while the listing shows that very manifest, so an index that is old, partial, damaged or
missing costs reads and never a result. Segments `index/1/<sha256 of their bytes>-<rows>` are written once and whole;
two writers at worst write a row twice. Small ones are merged by whoever writes; who misses one reads manifests.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from orchestrator.errors import StoreError
from orchestrator.store.artifacts import Artifacts
from orchestrator.store.manifest import Blob, Manifest
from orchestrator.store.objects import Entry, Objects

log = logging.getLogger(__name__)

FOLDER = "index/1"
# Rows of a full segment: small enough to be read in one piece, large enough that a hundred thousand are few objects.
ROWS = 4096
# More segments that are not full than this are merged.
MOST_SMALL = 8
# A time of a store has whole seconds: what is younger may change again and look the same.
SETTLED_SECONDS = 3.0
# An index with this share of the artifacts is not rebuilt: the rest is read by whoever wants it.
ENOUGH = 0.9
_NOTHING: Mapping[str, Any] = {}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Row:
    """A manifest without its spec, and the size and time of the object that it was read from."""

    size: int
    modified: float
    manifest: Manifest

    @property
    def key(self) -> str:
        return self.manifest.key

    def is_of(self, entry: Entry) -> bool:
        return self.size == entry.size and self.modified == entry.modified


class Index:
    """Manifests of one store, each read once."""

    def __init__(self, objects: Objects, artifacts: Artifacts) -> None:
        self._objects = objects
        self._artifacts = artifacts
        self._rows: dict[str, _Row] = {}
        self._segments: dict[str, int] = {}  # those that were read or written -> their number of rows
        self._unsaved: set[str] = set()
        self._noted: set[str] = set()
        self._equal: dict[str, Mapping[str, Any]] = {}  # one object for all equal numerics and provenances
        self._told: frozenset[str] | None = None  # words of `info` that are kept; None: all that a manifest says

    def keep_only(self, told: Collection[str]) -> None:
        """Keep of manifests what they are, their metrics and these words of `info`; nothing is saved from then on.

        For a command that only reads, and of a large store few words of each artifact.
        """
        self._told = frozenset(told)
        for known in (self._rows, self._segments, self._unsaved):
            known.clear()

    def many(self, keys: Collection[str]) -> dict[str, Manifest]:
        """Return the manifests of those of `keys` that exist, without their specs.

        One listing; then what neither this process nor the index knows is read from the manifests themselves.
        """
        wanted = keys if isinstance(keys, (set, frozenset, dict)) else set(keys)
        entries = {key: entry for key, entry in self._artifacts.entries() if key in wanted}
        if any(self._unknown(key, entry) for key, entry in entries.items()):
            self._read_segments(entries)
        now = self._objects.now()
        found: dict[str, Manifest] = {}
        unknown = []
        for key, entry in entries.items():
            if self._unknown(key, entry):
                unknown.append(entry)
            else:
                found[key] = self._rows[key].manifest
        for batch in _batches(unknown, ROWS):
            read = self._artifacts.load_many([_key(entry) for entry in batch])
            for entry in batch:
                key = _key(entry)
                self._rows.pop(key, None)
                if key not in read:
                    continue
                found[key] = self._slim(read.pop(key))
                if now - entry.modified > SETTLED_SECONDS:
                    self._rows[key] = _Row(entry.size, entry.modified, found[key])
                    self._unsaved.add(key)
        if self._told is not None:
            self._unsaved.clear()
        return found

    def note(self, keys: Iterable[str]) -> None:
        """Remember that these artifacts were committed: `save` reads and writes them, and keeps nothing of them."""
        self._noted.update(keys)

    def rebuild(self, keys: Collection[str], listed: int) -> None:
        """Write the index of these artifacts where it is missing, or lacks a part that is worth the reading.

        `listed` is how many artifacts the store has.
        """
        rows = sum(_rows_in(entry) for entry in self._objects.list(FOLDER))
        if rows >= ENOUGH * listed:
            return
        self.many(keys)
        self.save()

    def save(self, *, fewest: int = 1) -> None:
        """Write what was read or noted since, if it is at least `fewest` manifests, and merge segments that are small.

        Trouble with the store is not raised: the index can be done without.
        """
        try:
            self._save(fewest)
        except StoreError as error:
            log.debug("the index was not written: %s", error)

    def _save(self, fewest: int) -> None:
        passing = self._read_noted() if len(self._noted) + len(self._unsaved) >= max(1, fewest) else set()
        try:
            self._write(fewest)
        finally:
            for key in passing - self._unsaved:
                self._rows.pop(key, None)

    def _read_noted(self) -> set[str]:
        """Read the noted manifests that are old enough to be told from later ones; return those not known before."""
        now = self._objects.now()
        entries = {k: e for k, e in self._artifacts.entries() if k in self._noted}
        settled = {k: e for k, e in entries.items() if now - e.modified > SETTLED_SECONDS}
        self._noted &= entries.keys() - settled.keys()
        new = {key for key, entry in settled.items() if self._unknown(key, entry)}
        for key, manifest in self._artifacts.load_many(new).items():
            self._rows[key] = _Row(settled[key].size, settled[key].modified, self._slim(manifest))
            self._unsaved.add(key)
        return new

    def _write(self, fewest: int) -> None:
        self._unsaved &= self._rows.keys()
        small = [name for name, count in self._segments.items() if count < ROWS // 2]
        merged = small if len(small) > MOST_SMALL else []
        if not merged and len(self._unsaved) < max(1, fewest):
            return
        rows = self._live_rows(merged) | {key: self._rows[key] for key in self._unsaved}
        written = set()
        for batch in _batches([row for _, row in sorted(rows.items())], ROWS):
            data = _encode(batch)
            name = f"{hashlib.sha256(data).hexdigest()}-{len(batch)}"
            self._objects.create(f"{FOLDER}/{name}", data)
            self._segments[name] = len(batch)
            written.add(name)
        self._unsaved.clear()
        for name in merged:
            if name not in written:
                self._objects.delete(f"{FOLDER}/{name}")
                del self._segments[name]

    def _live_rows(self, segments: Sequence[str]) -> dict[str, _Row]:
        """Return the rows of these segments that are of manifests which are listed, whichever grid they belong to."""
        if not segments:
            return {}
        entries = dict(self._artifacts.entries())
        rows = (row for name in segments for row in _decode(self._objects.get(f"{FOLDER}/{name}") or b""))
        return {row.key: row for row in rows if row.key in entries and row.is_of(entries[row.key])}

    def _unknown(self, key: str, entry: Entry) -> bool:
        row = self._rows.get(key)
        return row is None or not row.is_of(entry)

    def _read_segments(self, entries: Mapping[str, Entry]) -> None:
        """Take the rows of segments that were not read yet and that are of the manifests listed."""
        listed = [entry.path.rsplit("/", 1)[1] for entry in self._objects.list(FOLDER)]
        new = [name for name in listed if name not in self._segments]
        for names in _batches(new, max(1, self._objects.parallelism)):
            bodies = self._objects.parallel(lambda name: self._objects.get(f"{FOLDER}/{name}"), names)
            for name, body in zip(names, bodies, strict=True):
                rows = [] if body is None or hashlib.sha256(body).hexdigest() != name.split("-")[0] else _decode(body)
                if not rows:
                    log.debug("segment %s of the index is gone or damaged: manifests are read instead", name)
                for row in rows:
                    if row.key in entries and row.is_of(entries[row.key]):
                        self._rows[row.key] = replace(row, manifest=self._shared(row.manifest))
                        self._unsaved.discard(row.key)
                self._segments[name] = len(rows)

    def _slim(self, manifest: Manifest) -> Manifest:
        return self._shared(replace(manifest, spec=_NOTHING))

    def _shared(self, manifest: Manifest) -> Manifest:
        """Return the manifest with numerics and provenance that it shares with others: most have the same."""
        if self._told is not None:
            info = {name: value for name, value in manifest.info.items() if name in self._told}
            return Manifest(manifest.key, manifest.kind, _NOTHING, metrics=manifest.metrics, info=info or _NOTHING)
        made = [self._equal.setdefault(json.dumps(part), part) for part in (manifest.numerics, manifest.provenance)]
        return replace(manifest, numerics=made[0], provenance=made[1])


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _key(entry: Entry) -> str:
    return entry.path.rsplit("/", 1)[-1].removesuffix(".json")


def _rows_in(entry: Entry) -> int:
    count = entry.path.rpartition("-")[2]
    return int(count) if count.isdecimal() else 0


_FIELDS = ("key", "kind", "parents", "attempt", "generation", "metrics", "info", "created")


def _encode(rows: Sequence[_Row]) -> bytes:
    """Return a segment: numerics and provenances once each, then the rows, as compressed JSON."""
    parts: dict[str, int] = {}
    body = []
    for row in rows:
        manifest = row.manifest
        numbers = [parts.setdefault(json.dumps(part), len(parts)) for part in (manifest.numerics, manifest.provenance)]
        blobs = [[blob.name, blob.path, blob.size, blob.sha256] for blob in manifest.blobs]
        body.append([row.size, row.modified, *numbers, blobs, *(getattr(manifest, name) for name in _FIELDS)])
    text = json.dumps({"parts": [json.loads(part) for part in parts], "rows": body}, default=dict)
    return zlib.compress(text.encode(), 3)


def _decode(data: bytes) -> list[_Row]:
    """Return the rows of a segment, [] if it cannot be read."""
    try:
        body = json.loads(zlib.decompress(data))
        parts = body["parts"]
        rows = []
        for size, modified, numerics, provenance, blobs, *values in body["rows"]:
            fields = dict(zip(_FIELDS, values, strict=True))
            key = fields["key"]
            fields["blobs"] = tuple([Blob(name, path, length, sha, key) for name, path, length, sha in blobs])
            made = Manifest(spec=_NOTHING, numerics=parts[numerics], provenance=parts[provenance], **fields)
            rows.append(_Row(size, modified, made))
    except (ValueError, LookupError, TypeError, zlib.error):
        return []
    return rows
