"""Weights that a state has as an earlier one has them: they are known by their digests and lie in the store once.

`tensors.json` of a state names each of its tensors with its bytes, its digest and the state in whose files it lies. A
later state writes what has another digest than in its parent; the files that hold the rest are blobs of its manifest as
well, named `kept-<state>/<file>`, so that whatever keeps, checks or reads a state's blobs does so with these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from jobs.models.shards import Layout, Rows, layouts_in, rows_digest, weight_names
from jobs.node.context import StageContext
from orchestrator.store import Blob, Manifest
from orchestrator.store.manifest import KEPT, LEAST_KEPT, TENSORS

_MODULUS = 1 << 256


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor of a state: its bytes, the digest of its rows, and the state in whose files it lies ("": not said)."""

    bytes: int
    digest: int
    state: str = ""


Record = Mapping[str, Described]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a state has of earlier ones: tensor -> the state whose files hold it, these files, and what they hold."""

    owners: Mapping[str, str]
    blobs: tuple[Blob, ...] = ()
    layouts: Mapping[str, Layout] = field(default_factory=dict)


def described(pieces: Mapping[str, Rows]) -> Record:
    """Return the tensors of which these are pieces, each with the digest of its piece."""
    return {
        name: Described(math.prod(piece.shape) * piece.written.itemsize, rows_digest({name: piece}))
        for name, piece in pieces.items()
    }


def whole(shares: Iterable[Record]) -> Record:
    """Return the tensors of which the shares of several ranks are pieces: digests of pieces add up."""
    found: dict[str, Described] = {}
    for share in shares:
        for name, piece in share.items():
            before = found[name].digest if name in found else 0
            found[name] = replace(piece, digest=(before + piece.digest) % _MODULUS)
    return found


def to_json(record: Record) -> str:
    """Return `tensors.json`."""
    rows = {name: [one.bytes, f"{one.digest:064x}", one.state] for name, one in sorted(record.items())}
    return json.dumps(rows)


def from_json(data: bytes | str) -> Record:
    """Rebuild what `to_json` wrote."""
    return {name: Described(size, int(digest, 16), state) for name, (size, digest, state) in json.loads(data).items()}


def unchanged(parent: Manifest, record: Record, tensors: Record) -> Kept:
    """Return what of `tensors` lies in files of the parent state, or of those before it whose files it keeps itself."""
    same = {
        name: record[name].state
        for name, tensor in tensors.items()
        if name in record and record[name].digest == tensor.digest
    }
    owners: dict[str, str] = {}
    blobs: list[Blob] = []
    # In the parent's order: a tensor is read from the first files that have it.
    for names in weight_names(parent):
        files = [parent.blob(name) for name in names]
        state = names[0].partition("/")[0].removeprefix(KEPT) if names[0].startswith(KEPT) else parent.key
        held = [name for name, owner in same.items() if owner == state]
        if sum(tensors[name].bytes for name in held) >= LEAST_KEPT * max(1, sum(blob.size for blob in files)):
            owners |= dict.fromkeys(held, state)
            blobs += [replace(blob, name=f"{KEPT}{state}/{blob.name.rpartition('/')[2]}") for blob in files]
    return Kept(owners, tuple(blobs))


def agreed(context: StageContext, key: str, parent: str, share: Record, patience: float) -> tuple[Kept, Record]:
    """Return what the state `key` has of earlier ones and, on rank 0, all of its tensors. Every rank calls this.

    Rank 0 adds up the digests of all ranks' pieces and tells the others what they need not write.
    """
    alone = context.world_size == 1
    if context.rank > 0:
        from jobs.node.ranks import meeting, told

        meeting().set(f"tensors/{key}/{context.rank}", to_json(share))
        (owned,) = told([f"kept/{key}"], patience)
        return Kept(dict.fromkeys(json.loads(owned), "")), share
    others = [] if alone else _collected(context, key, patience)
    tensors = whole([share, *others])
    manifest = context.manifest(parent)
    known = any(blob.name == TENSORS for blob in manifest.blobs)
    record = from_json(context.fetch(parent, TENSORS).read_bytes()) if known else {}
    kept = unchanged(manifest, record, tensors)
    layouts = layouts_in(context, parent) if kept.blobs and not alone else {}
    places = {blob.name: blob.name.removeprefix(f"{KEPT}{parent}/") for blob in kept.blobs}
    kept = replace(kept, layouts={name: layouts[place] for name, place in places.items() if place in layouts})
    if not alone:
        from jobs.node.ranks import meeting

        meeting().set(f"kept/{key}", json.dumps(sorted(kept.owners)))
    return kept, {name: replace(one, state=kept.owners.get(name, key)) for name, one in tensors.items()}


def _collected(context: StageContext, key: str, patience: float) -> list[Record]:
    from jobs.node.ranks import meeting, told

    names = [f"tensors/{key}/{rank}" for rank in range(1, context.world_size)]
    found = [from_json(said) for said in told(names, patience)]
    for name in names:
        meeting().delete_key(name)
    return found
