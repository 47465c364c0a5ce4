"""Files inside a fetched package (.tgz of npm, .deb of Debian), read into memory: nothing is unpacked, nothing is run.

An archive with a member whose path leads out of it is refused whole. Links and devices are no files: they are passed
over, and never followed. Sizes are bounded, so that a few bytes cannot become a machine full of zeros.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

from orchestrator.errors import SourceError

# Bounds of what is read: one file, all files of an archive as they lie unpacked, and how many members it may have.
FILE_BYTES = 32 * 2**20
ARCHIVE_BYTES = 4 * 2**30
MEMBERS = 200_000

_AR = b"!<arch>\n"
_HEADER = 60
# What a damaged stream makes its readers raise.
_DAMAGED = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError)


def files_of(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (path inside the archive, content) of the regular files that are `wanted`, in the archive's order.

    SourceError for an archive that is damaged, leads out of itself, or is larger than the bounds above.
    """
    total = 0
    with _opened(path) as archive:
        for number, member in enumerate(_members(path, archive)):
            name = _inside(path, member.name)
            total += member.size
            if number >= MEMBERS:
                raise _refused(path, f"has more than {MEMBERS:,} members")
            if total > ARCHIVE_BYTES:
                raise _refused(path, f"holds more than {ARCHIVE_BYTES / 2**30:g} GiB")
            if not member.isfile() or not wanted(name):
                continue
            if member.size > FILE_BYTES:
                raise _refused(path, f"holds {name} of {member.size / 2**20:.0f} MiB", f"{FILE_BYTES / 2**20:g} MiB")
            yield name, _content(path, archive, member)


def _members(path: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while True:
        try:
            member = archive.next()
        except _DAMAGED as error:
            raise damaged(path, error) from None
        if member is None:
            return
        yield member
        # A stream keeps every member that it has passed.
        archive.members.clear()  # type: ignore[attr-defined]


def _content(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        content = cast(IO[bytes], archive.extractfile(member)).read(member.size + 1)
    except _DAMAGED as error:
        raise damaged(path, error) from None
    if len(content) != member.size:
        raise damaged(path, EOFError(f"{member.name} ends early"))
    return content


def damaged(path: Path, error: BaseException) -> SourceError:
    """Return the error of an archive that cannot be read."""
    said = f"{type(error).__name__}: {error}".split("\n")[0]
    return SourceError(f"{path} is damaged", cause=said, hint="delete it, and it is fetched again")


def _refused(path: Path, what: str, bound: str = "") -> SourceError:
    cause = f"at most {bound} are read" if bound else ""
    return SourceError(f"{path} {what}", cause=cause, hint="this is not the package that it is named after: delete it")


def _inside(path: Path, name: str) -> str:
    """Return a member's path without a leading `./`; SourceError when it leads out of the archive."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name or ":" in name.partition("/")[0]:
        raise _refused(path, f"has a member that leads out of it, {name[:80]!r}")
    return parts.as_posix()


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """Open the files of a package as a stream of tar members."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_AR))
            if head == _AR:
                stream, mode = _data_of(path, file)
            else:
                file.seek(0)
                stream, mode = file, "r|gz"
            with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
                yield archive
    except SourceError:
        raise
    except _DAMAGED as error:
        raise damaged(path, error) from None


def _data_of(path: Path, file: BinaryIO) -> tuple[IO[bytes], str]:
    """Return the stream of `data.tar.*` of a Debian package (ar), and how tarfile reads it."""
    while len(header := file.read(_HEADER)) == _HEADER:
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), header[48:58].strip()
        if header[58:60] != b"`\n" or not size.isdigit():
            break
        if name.startswith("data.tar"):
            part = cast(IO[bytes], _Part(file, int(size)))
            kind = name.removeprefix("data.tar").removeprefix(".")
            if kind in ("", "gz", "xz", "bz2"):
                return part, f"r|{kind}"
            if kind == "zst":
                import pyarrow as pa

                return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(part, mode="r"), "zstd")), "r|"
            raise SourceError(f"{path} is packed by {kind!r}", hint="gz, xz, bz2 and zst are read")
        file.seek(int(size) + int(size) % 2, 1)
    raise damaged(path, EOFError("no data.tar in it"))


class _Part:
    """The next `size` bytes of a file, as a file that is read once from beginning to end."""

    closed = False

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int = -1) -> bytes:
        found = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(found)
        return found

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        pass
