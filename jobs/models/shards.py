"""Weights and optimizer tensors in files: the shards that ranks write, read back as one mapping, and their digest."""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.errors import MoegridError
from orchestrator.store import Manifest
from orchestrator.store.manifest import FILES, KEPT

if TYPE_CHECKING:
    from jobs.node.context import StageContext

_MODULUS = 1 << 256
# In a file's metadata: the number of the first row of every tensor of which it does not hold the first one.
_FIRST = "first_rows"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `first`, `first + 1`, ... along the first dimension of a tensor whose shape is `shape`.

    `dtype` is what they are written and digested in, if not as they are: nothing holds all of them converted. `shared`:
    every rank reads them, so they lie apart from what one rank alone reads.
    """

    tensor: Tensor
    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    shared: bool = False

    @classmethod
    def whole(cls, tensor: Tensor, *, shared: bool = False) -> Rows:
        """Return all rows of `tensor`."""
        return cls(tensor, 0, tuple(tensor.shape), shared=shared)

    @property
    def written(self) -> torch.dtype:
        """In which type the rows are written."""
        return self.dtype or self.tensor.dtype


def shard_name(kind: str, rank: int, world_size: int) -> str:
    """Return the blob name of one rank's share of `kind` (`weights` or `optimizer`)."""
    return f"{kind}.safetensors" if world_size == 1 else f"{kind}-{rank:05d}-of-{world_size:05d}.safetensors"


def share_of(names: Sequence[str], rank: int, world_size: int) -> list[str]:
    """Return those blobs of a state that a rank reads for all: each is one rank's, who wrote it where as many go on.

    Of files of more or fewer ranks it is one whose rows lie there, as far as every rank holds an equal part.
    """

    def reader(number: int, name: str) -> int:
        found = re.search(r"-(\d{5})-of-(\d{5})\.safetensors$", name)
        return (int(found[1]) * world_size // max(1, int(found[2])) if found else number) % world_size

    return [name for number, name in enumerate(names) if reader(number, name) == rank]


def shard_names(manifest: Manifest, kind: str) -> list[str]:
    """Return the blobs of a state that are shards of `kind`, in the order of their ranks; MoegridError if none is."""
    names = sorted(blob.name for blob in manifest.blobs if blob.name.startswith((f"{kind}.", f"{kind}-")))
    return names or [manifest.blob(shard_name(kind, 0, 1)).name]


def weight_names(manifest: Manifest) -> list[list[str]]:
    """Return the blobs with a state's weights: its own shards, then, state by state, those of earlier ones.

    A tensor is that of the first which have it: an earlier state's files hold former values of what changed since.
    """
    kept: dict[str, list[str]] = {}
    for blob in manifest.blobs:
        if blob.name.startswith(KEPT):
            kept.setdefault(blob.name.partition("/")[0], []).append(blob.name)
    return [shard_names(manifest, "weights"), *(sorted(names) for names in kept.values())]


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file of contiguous tensors, readable by whom the umask says: the library leaves it 0600."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    path.chmod(mode)


def write_pieces(pieces: Mapping[str, Rows], path: Path) -> None:
    """Write rows as `write_tensors` does; the file says where those begin that are not the first ones."""
    first = {name: piece.first for name, piece in pieces.items() if piece.first}
    tensors = {name: piece.tensor for name, piece in pieces.items()}
    write_tensors(tensors, path, {_FIRST: json.dumps(first, sort_keys=True)} if first else None)


def dealt(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """Return those of the tensors, which every rank holds, that `rank` writes: shares of nearly equal bytes."""
    loads = [0] * world_size
    share: dict[str, Tensor] = {}
    for size, name in sorted((-tensor.nbytes, name) for name, tensor in tensors.items()):
        owner = loads.index(min(loads))
        loads[owner] -= size
        if owner == rank:
            share[name] = tensors[name]
    return share


# What a file holds: tensor -> its type, the number of its first row, its shape there.
Layout = Mapping[str, tuple[str, int, tuple[int, ...]]]


def layout_of(path: Path | str) -> Layout:
    """Return what a safetensors file holds, from its header."""
    return _layout(safe_open(path, framework="pt"))


def _layout(file: safe_open) -> Layout:
    first = json.loads((file.metadata() or {}).get(_FIRST, "{}"))
    found = {}
    for name in file.keys():  # noqa: SIM118 (not a dict)
        piece = file.get_slice(name)
        shape = tuple(piece.get_shape())
        dtype = (piece[:0] if shape else file.get_tensor(name)).dtype
        found[name] = (str(dtype).removeprefix("torch."), int(first.get(name, 0)), shape)
    return found


def layouts_to_json(layouts: Mapping[str, Layout]) -> str:
    """Return `files.json`: what each file of a state holds."""
    return json.dumps({file: {n: [t, f, *s] for n, (t, f, s) in own.items()} for file, own in layouts.items()})


def layouts_from_json(data: bytes | str) -> dict[str, Layout]:
    """Rebuild what `layouts_to_json` wrote."""
    return {
        file: {name: (dtype, first, tuple(shape)) for name, (dtype, first, *shape) in own.items()}
        for file, own in json.loads(data).items()
    }


class ShardFile:
    """A file of a state. One of which it is known what it holds is asked for when something of it is read."""

    def __init__(self, fetch: Callable[[], Path | str], layout: Layout | None = None) -> None:
        """`fetch` returns the file, verified; at once where it is not known what it holds."""
        self._fetch = fetch
        self._file: safe_open | None = None
        if layout is None:
            self._file = safe_open(fetch(), framework="pt")
            layout = _layout(self._file)
        self.layout: Layout = layout

    @property
    def opened(self) -> safe_open:
        """The open file. Raises MoegridError when it holds something else than was said of it."""
        if self._file is None:
            path = self._fetch()
            self._file = safe_open(path, framework="pt")
            if _layout(self._file) != self.layout:
                raise MoegridError(f"{Path(path).name} does not hold what {FILES} of its state says")
        return self._file


class Shards(Mapping[str, Tensor]):
    """The tensors of several safetensors files, each read when it is asked for: memory never holds all of them.

    A tensor of which several files hold pieces is put together in the order of the rows that the files name, else in
    that of the files. Pieces are rows, or, of an optimizer's tensors, flat runs of elements: then the tensor is flat
    too, and only its reader knows its shape. Of several groups of files (`weight_names`) the first that has a tensor
    counts.
    """

    def __init__(self, *groups: Iterable[Path | str | ShardFile]) -> None:
        self._owners: dict[str, list[ShardFile]] = {}
        for files in groups:
            found: dict[str, list[tuple[int, ShardFile]]] = {}
            for one in files:
                file = one if isinstance(one, ShardFile) else ShardFile(partial(Path, one))
                for name, (_, first, _) in file.layout.items():
                    found.setdefault(name, []).append((first, file))
            ordered = {name: [file for _, file in sorted(parts, key=itemgetter(0))] for name, parts in found.items()}
            self._owners = ordered | self._owners

    def __getitem__(self, name: str) -> Tensor:
        pieces = [file.opened.get_tensor(name) for file in self._owners[name]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def elements(self, name: str, start: int, count: int) -> Tensor:
        """Return `count` elements of a tensor from `start` on, flat; no more than the rows they lie in is read."""
        found: list[Tensor] = []
        offset = 0
        for file in self._owners[name]:
            shape = file.layout[name][2]
            size = math.prod(shape)
            begin, end = max(start - offset, 0), min(start + count - offset, size)
            if begin < end:
                width = size // shape[0] if shape else 1
                first, last = begin // width, -(-end // width)
                rows = file.opened.get_slice(name)[first:last] if shape else file.opened.get_tensor(name)
                found.append(rows.reshape(-1)[begin - first * width : end - first * width])
            offset += size
        if not found:
            found.append(torch.empty(0, dtype=getattr(torch, self._owners[name][0].layout[name][0])))
        return found[0] if len(found) == 1 else torch.cat(found)

    def __contains__(self, name: object) -> bool:
        return name in self._owners  # a mapping's own way is to read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)


def elements(tensors: Mapping[str, Tensor], name: str, start: int, count: int) -> Tensor:
    """Return `count` elements of a named tensor from `start` on, flat."""
    if isinstance(tensors, Shards):
        return tensors.elements(name, start, count)
    return tensors[name].reshape(-1)[start : start + count]


def fetch_shards(context: StageContext, key: str, kind: str, *, some: bool = False) -> Shards:
    """Return the verified `weights` or `optimizer` of the state `key`; MoegridError if it has none, CorruptBlob.

    `some`: not all rows will be read, and a file is fetched and verified when rows of it are, where the state says what
    its files hold; what it says is verified as they are.
    """
    manifest = context.manifest(key)
    groups = weight_names(manifest) if kind == "weights" else [shard_names(manifest, kind)]
    layouts = layouts_in(context, key) if some else {}
    if not layouts:
        return Shards(*(context.fetch_all(key, names) for names in groups))
    return Shards(*([ShardFile(partial(context.fetch, key, n), layouts.get(n)) for n in names] for names in groups))


def layouts_in(context: StageContext, key: str) -> dict[str, Layout]:
    """Return what the files of the state `key` hold, where it says so; CorruptBlob."""
    told = any(blob.name == FILES for blob in context.manifest(key).blobs)
    return layouts_from_json(context.fetch(key, FILES).read_bytes()) if told else {}


def rows_digest(pieces: Mapping[str, Rows]) -> int:
    """Return the sum modulo 2^256 of every row's sha256: its tensor's name, dtype and shape, its number, its bytes.

    The digests of pieces add up to that of the whole, whoever holds which rows.
    """
    total = 0
    for name, piece in pieces.items():
        start = hashlib.sha256(f"{name} {piece.written} {piece.shape}\n".encode())
        count = len(piece.tensor) if piece.tensor.dim() else 1
        tensor = piece.tensor.detach().to("cpu", piece.written).contiguous()
        size = tensor.nbytes // max(count, 1)
        data = tensor.view(-1).view(torch.uint8).numpy().data
        for number in range(count):
            row = start.copy()
            row.update((piece.first + number).to_bytes(8, "little"))
            row.update(data[number * size : (number + 1) * size])
            total += int.from_bytes(row.digest(), "big")
    return total % _MODULUS


def digest_bytes(digest: int) -> bytes:
    """Return a digest as 32 bytes, the most significant first."""
    return digest.to_bytes(32, "big")


def digest_text(parts: Iterable[int]) -> str:
    """Return the digest of a whole whose pieces have the digests `parts`, in hexadecimal."""
    return f"{sum(parts) % _MODULUS:064x}"


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of names, dtypes, shapes and bytes of whole tensors, in any order."""
    return digest_text([rows_digest({name: Rows.whole(tensor) for name, tensor in tensors.items()})])
