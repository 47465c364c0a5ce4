"""Manifests: what the store knows of an artifact, as one line of JSON with a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from orchestrator.errors import MoegridError, StoreError

# 2: a training state that says whether its optimizer's state is there; all other manifests are as they were.
FORMAT = 2
_CHECKSUM = b',"checksum":"'
# Blobs that tell of a run's course (times, rates): no child reads them, so they do not make a child stale.
OBSERVATIONS = frozenset({"series.json"})
# What a state's tensors are and where they lie: as its weights say.
TENSORS = "tensors.json"
# What each of a state's files holds, of one that several ranks wrote.
FILES = "files.json"
# Of a training state, in `info`: the digest of its weights, and whether its optimizer's state was kept.
WEIGHTS, MOMENTS = "weights_sha256", "moments"
# Of an earlier state's files at least this share is unchanged where they are kept: a later state's reader reads them.
LEAST_KEPT = 0.25
KEPT = "kept-"  # how the names of files begin that lie in an earlier state: `kept-<state>/<file>`
OPTIMIZER = "optimizer"  # how the names of its files begin


@dataclass(frozen=True, slots=True)
class Blob:
    """A named file of an artifact: where it lies, its size in bytes and its sha256."""

    name: str
    path: str
    size: int
    sha256: str
    artifact: str = field(default="", compare=False)  # the key it was read under, for error messages


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of an artifact. `parents` maps parent keys to the digests their manifests had when it was made."""

    key: str
    kind: str
    spec: Mapping[str, Any]
    parents: Mapping[str, str] = field(default_factory=dict)
    numerics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    attempt: str = ""
    generation: int = 0
    blobs: tuple[Blob, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    created: float = 0.0

    @property
    def digest(self) -> str:
        """The bits a child can depend on: equal after a repair that reproduced them, whoever made them and when.

        A training state is its weights, with or without its optimizer's state and however they are cut into files.
        """
        if MOMENTS not in self.info:
            return self.digest_of_blobs
        return hashlib.sha256(json.dumps([self.key, self.kind, self.info[WEIGHTS]]).encode()).hexdigest()

    @property
    def digest_of_blobs(self) -> str:
        """The digest of the same bits as they lie in files, by which children of earlier versions know a state."""
        aside = {*OBSERVATIONS, TENSORS, FILES}
        content = sorted([blob.name, blob.size, blob.sha256] for blob in self.blobs if blob.name not in aside)
        return hashlib.sha256(json.dumps([self.key, self.kind, content]).encode()).hexdigest()

    @property
    def resumable(self) -> bool:
        """Whether training can go on from this state within its phase: its optimizer's state was kept."""
        return bool(self.info.get(MOMENTS, True))

    def completing(self, other: Manifest) -> Manifest | None:
        """Return `other` with the optimizer's state of this manifest, None unless it is the same state without it.

        Its weights stay where they lie: other states may name the same files.
        """
        if not self.resumable or other.resumable or self.digest != other.digest:
            return None
        return replace(self, blobs=(*other.blobs, *(blob for blob in self.blobs if blob.name.startswith(OPTIMIZER))))

    def blob(self, name: str) -> Blob:
        """Return the blob called `name`; MoegridError if the artifact has none (asking again would not help)."""
        for blob in self.blobs:
            if blob.name == name:
                return blob
        raise MoegridError(
            f"artifact {self.key[:12]} ({self.kind}) has no blob {name!r}",
            cause=f"it holds: {', '.join(blob.name for blob in self.blobs) or 'none'}",
        )

    def to_bytes(self) -> bytes:
        """Return the manifest as one line of JSON whose last field is a checksum of what stands before it."""
        fields: dict[str, object] = {"format": FORMAT if MOMENTS in self.info else 1}
        fields |= {name: getattr(self, name) for name in _FIELDS}
        fields["blobs"] = [{name: getattr(blob, name) for name in _BLOB_FIELDS} for blob in self.blobs]
        body = json.dumps(fields, separators=(",", ":"), ensure_ascii=False, default=_plain).encode()[:-1]
        return body + _CHECKSUM + hashlib.sha256(body).hexdigest().encode() + b'"}'

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest | None:
        """Rebuild a manifest; None if the bytes are damaged."""
        cut = data.rfind(_CHECKSUM)
        if cut < 0 or data[cut + len(_CHECKSUM) : -2] != hashlib.sha256(data[:cut]).hexdigest().encode():
            return None
        fields = json.loads(data)
        if fields["format"] > FORMAT:
            raise StoreError(
                f"artifact {fields['key'][:12]} was written by a newer moegrid",
                hint="update moegrid, or use another store",
            )
        key = fields["key"]
        blobs = tuple(Blob(b["name"], b["path"], b["size"], b["sha256"], key) for b in fields["blobs"])
        return cls(**{name: fields[name] for name in _FIELDS if name != "blobs"}, blobs=blobs)


_FIELDS = tuple(Manifest.__dataclass_fields__)
_BLOB_FIELDS = ("name", "path", "size", "sha256")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return asdict(value)
