"""A store in a local (or network) folder, on POSIX calls.

obstore's LocalStore has no compare-and-swap and never syncs a file, and a small read takes it five times as long,
so a folder has its own implementation of the same operations: a file is written in full and synced (a lease need not
be) under `.moegrid/tmp`, then linked (`create`) or renamed (`put`, `replace`) into place; `replace` and `delete` hold
a lock that the kernel drops when a process dies. SIGKILL at any moment leaves at most a stray file under
`.moegrid/tmp`, which no listing shows. A version is the sha256 of the bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.errors import StoreError
from orchestrator.store.objects import Entry, Object, Objects, check_path

_CHUNK = 4 << 20
_LOCKS = 64

_HINTS = {
    errno.ENOSPC: ("the disk is full", "free some space (moegrid gc shows what can go), then: moegrid resume"),
    errno.EDQUOT: ("the disk quota is used up", "free some space (moegrid gc shows what can go), then: moegrid resume"),
    errno.EROFS: ("the file system is read-only", "choose another folder with STORE= or --store"),
    errno.EACCES: ("no permission", "give yourself write permission, or choose another folder with STORE= or --store"),
    errno.EPERM: ("no permission", "give yourself write permission, or choose another folder with STORE= or --store"),
    errno.ENOTDIR: ("a file stands where a folder should be", "move it away, or choose another folder with --store"),
    errno.EEXIST: ("a file stands where a folder should be", "move it away, or choose another folder with --store"),
    errno.EISDIR: ("a folder stands where a file should be", "move it away"),
}


def _lasting(path: str) -> bool:
    """Whether the object must outlive a power cut: a lease need not, for its holders do not either."""
    return not path.startswith("claims/")


class LocalObjects(Objects):
    """Objects as files below one folder."""

    def __init__(self, root: Path, *, prepare: bool = True) -> None:
        """`prepare` makes the folder; without it nothing may be written."""
        self.root = Path(os.path.abspath(root))
        super().__init__(str(self.root))
        self._own = self.root / ".moegrid"
        self._prefix = str(self.root) + "/"
        with self._errors("open"):
            for folder in ("tmp", "locks") if prepare else ():
                (self._own / folder).mkdir(parents=True, exist_ok=True)
            if prepare:
                self._touch()

    def local_path(self, path: str) -> Path | None:
        return Path(self._file(path))

    def read(self, path: str) -> Object | None:
        with self._errors("read", path):
            try:
                with open(self._file(path), "rb", buffering=0) as file:
                    data = file.read()
                    modified = os.fstat(file.fileno()).st_mtime
            except FileNotFoundError:
                return None
        return Object(data, hashlib.sha256(data).hexdigest(), modified)

    def get(self, path: str) -> bytes | None:
        with self._errors("read", path):
            try:
                with open(self._file(path), "rb", buffering=0) as file:
                    return file.read()
            except FileNotFoundError:
                return None

    def put(self, path: str, data: bytes) -> None:
        target = self._file(path)
        with self._errors("write", path), self._staged([data], sync=False) as staged, self._lock(path):
            self._place(os.rename, staged, target)

    def create(self, path: str, data: bytes) -> bool:
        target = self._file(path)
        with self._errors("write", path):
            if os.path.exists(target):
                return False
            with self._staged([data], sync=_lasting(path)) as staged:
                return self._link(staged, target)

    def replace(self, path: str, data: bytes, version: str) -> bool:
        target = self._file(path)
        with self._errors("write", path), self._staged([data], sync=_lasting(path)) as staged, self._lock(path):
            current = self.get(path)
            if current is None or hashlib.sha256(current).hexdigest() != version:
                return False
            os.rename(staged, target)
            return True

    def upload(self, path: str, source: Path) -> tuple[int, str]:
        target = self._file(path)
        sha256 = hashlib.sha256()
        size = 0

        def pieces() -> Iterator[bytes]:
            nonlocal size
            with open(source, "rb", buffering=0) as file:
                while piece := file.read(_CHUNK):
                    sha256.update(piece)
                    size += len(piece)
                    yield piece

        with self._errors("write", path), self._staged(pieces()) as staged:
            if not self._link(staged, target):
                raise StoreError(f"{path} exists already", cause="an uploaded object is never overwritten")
        return size, sha256.hexdigest()

    def chunks(self, path: str) -> Iterator[bytes] | None:
        with self._errors("read", path):
            try:
                file = open(self._file(path), "rb", buffering=0)  # noqa: SIM115 (closed by the generator)
            except FileNotFoundError:
                return None

        def pieces() -> Iterator[bytes]:
            with self._errors("read", path), file:
                while piece := file.read(_CHUNK):
                    yield piece

        return pieces()

    def list(self, prefix: str) -> Iterator[Entry]:
        base = check_path(prefix.strip("/")) if prefix.strip("/") else ""
        yield from self._walk(str(self.root / base) if base else str(self.root), base + "/" if base else "")

    def delete(self, path: str) -> None:
        with self._errors("delete", path), self._lock(path), contextlib.suppress(FileNotFoundError):
            os.unlink(self._file(path))
            # Emptied folders of attempts go too; a folder that is not empty stays.
            with contextlib.suppress(OSError):
                for folder in list(Path(path).parents)[:-2]:
                    os.rmdir(self.root / folder)

    def sweep(self, older_than: float) -> int:
        """Delete what killed writers left under `.moegrid/tmp` before the store time `older_than`; return the count."""
        swept = 0
        with self._errors("sweep", ".moegrid/tmp"):
            for entry in os.scandir(self._own / "tmp"):
                with contextlib.suppress(FileNotFoundError):
                    if entry.stat().st_mtime < older_than:
                        os.unlink(entry.path)
                        swept += 1
        return swept

    def _walk(self, folder: str, base: str) -> Iterator[Entry]:
        with self._errors("list", base):
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except FileNotFoundError:
                return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(entry.path, f"{base}{entry.name}/")
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            except OSError:
                with self._errors("list", base):
                    raise
            yield Entry(base + entry.name, status.st_size, status.st_mtime)

    def _touch(self) -> float:
        clock = self._own / "clock"
        with self._errors("write", ".moegrid/clock"):
            handle = os.open(clock, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            try:
                os.utime(handle)
                return os.fstat(handle).st_mtime
            finally:
                os.close(handle)

    def _file(self, path: str) -> str:
        return self._prefix + check_path(path)

    @contextlib.contextmanager
    def _staged(self, pieces: Iterable[bytes], *, sync: bool = True) -> Iterator[str]:
        """A finished file outside the listed tree; gone at the end unless it was renamed."""
        staged = str(self._own / "tmp" / f"{os.getpid()}-{secrets.token_hex(8)}")
        try:
            handle = os.open(staged, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            try:
                for piece in pieces:
                    view = memoryview(piece)
                    while view:
                        view = view[os.write(handle, view) :]
                if sync:
                    os.fsync(handle)
            finally:
                os.close(handle)
            yield staged
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged)

    @contextlib.contextmanager
    def _lock(self, path: str) -> Iterator[None]:
        stripe = hashlib.sha256(path.encode()).digest()[0] % _LOCKS
        handle = os.open(self._own / "locks" / f"{stripe:02d}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _link(self, staged: str, target: str) -> bool:
        try:
            self._place(os.link, staged, target)
        except FileExistsError:
            if os.path.exists(target):
                return False
            raise
        return True

    @staticmethod
    def _place(move: Callable[[str, str], None], staged: str, target: str) -> None:
        try:
            move(staged, target)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            move(staged, target)

    @contextlib.contextmanager
    def _errors(self, action: str, path: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            cause, hint = _HINTS.get(
                error.errno or 0, ("", "check the disk, or choose another folder with STORE= or --store")
            )
            raise StoreError(
                f"cannot {action} {'the store' if action == 'open' else path} in {self.url}",
                cause=f"{cause}: {error}" if cause else str(error),
                hint=hint,
            ) from error


def open_folder(url: str, patience: float, prepare: bool) -> LocalObjects:
    """Open a folder by its plain path or `file://`."""
    if not url.startswith("file://"):
        return LocalObjects(Path(os.path.expanduser(url)), prepare=prepare)
    if urlsplit(url).netloc not in ("", "localhost"):
        raise StoreError(f"{url} names a folder of another host", hint="write file:///folder or the plain path")
    return LocalObjects(Path(unquote(urlsplit(url).path)), prepare=prepare)
