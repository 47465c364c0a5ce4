"""A store in an S3 bucket or in memory, on obstore.

Reads, overwrites, uploads and listings are retried inside obstore with jittered exponential back-off. A conditional
write must not be: after a lost answer the second try would meet the first one's object and call itself the loser.
So those are retried here, and a write whose outcome is unknown is settled by reading the object back.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import MemoryStore, S3Store

from orchestrator.errors import StoreError
from orchestrator.store.objects import Entry, Object, Objects, check_path

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

R = TypeVar("R")

# How long one request may take; large objects go in parts.
REQUEST_SECONDS = 60.0
_PART = 8 << 20
_READ_AHEAD = 6
_MAX_PARTS = 9_000  # S3 allows 10,000
_ABSENT = (FileNotFoundError, exceptions.NotFoundError)
_REFUSED = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
_FINAL = (
    *_ABSENT,
    *_REFUSED,
    exceptions.AlreadyExistsError,
    exceptions.PreconditionError,
    exceptions.InvalidPathError,
    exceptions.NotSupportedError,
    exceptions.UnknownConfigurationKeyError,
    NotImplementedError,
)
_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile in ~/.aws/credentials)"

_memory: dict[str, MemoryStore] = {}
_memory_lock = threading.Lock()


class BucketObjects(Objects):
    """Objects in `s3://bucket/prefix` or in `memory://name` (shared by all who open that name in one process)."""

    def __init__(self, url: str, *, patience: float) -> None:
        super().__init__(url)
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query:
            raise StoreError(
                "a store's URL must not hold credentials or options",
                hint=f"give s3://bucket/prefix alone and {_CREDENTIALS}; the endpoint is AWS_ENDPOINT_URL",
            )
        self._patience = patience
        prefix = parts.path.strip("/")
        self._prefix = check_path(prefix) + "/" if prefix else ""
        # Without keys obstore asks the machine for a role; a refusal then means that there are none.
        self._keys_found = bool(os.environ.get("AWS_ACCESS_KEY_ID") or "access_key_id" in _profile())
        self._store: MemoryStore | S3Store
        self._once: MemoryStore | S3Store
        if parts.scheme == "memory":
            with _memory_lock:
                self._store = self._once = _memory.setdefault(parts.netloc, MemoryStore())
            return
        self.parallelism = 16
        if not parts.netloc:
            raise StoreError(f"no bucket in {url!r}", hint="give s3://bucket/prefix")
        with self._errors("open"):
            self._store = _s3(parts.netloc, patience, retries=20)
            self._once = _s3(parts.netloc, patience, retries=0)

    def read(self, path: str) -> Object | None:
        with self._errors("read", path):
            try:
                found = obstore.get(self._store, self._key(path))
                data = bytes(found.bytes())
            except _ABSENT as error:
                self._check_bucket(error)
                return None
            meta = found.meta
            return Object(data, meta["e_tag"] or "", meta["last_modified"].timestamp())

    def put(self, path: str, data: bytes) -> None:
        with self._errors("write", path):
            obstore.put(self._store, self._key(path), data, use_multipart=False)

    def create(self, path: str, data: bytes) -> bool:
        key = self._key(path)

        def write() -> bool:
            try:
                obstore.put(self._once, key, data, mode="create", use_multipart=False)
            except exceptions.AlreadyExistsError:
                return False
            return True

        return self._conditional(path, data, write)

    def replace(self, path: str, data: bytes, version: str) -> bool:
        key = self._key(path)

        def write() -> bool:
            try:
                obstore.put(self._once, key, data, mode={"e_tag": version}, use_multipart=False)
            except (exceptions.PreconditionError, *_ABSENT):
                return False
            return True

        return self._conditional(path, data, write)

    def upload(self, path: str, source: Path) -> tuple[int, str]:
        key = self._key(path)
        try:
            expected = source.stat().st_size
            part = max(_PART, -(-expected // _MAX_PARTS))
            sent = _Hashed(source, part)
            with self._errors("write", path):
                if expected <= part:
                    obstore.put(self._store, key, b"".join(sent), use_multipart=False)
                else:
                    obstore.put(self._store, key, sent, use_multipart=True, chunk_size=part, max_concurrency=8)
        except OSError as error:
            raise StoreError(f"cannot read {source} to upload it", cause=str(error)) from error
        return sent.size, sent.sha256.hexdigest()

    def chunks(self, path: str) -> Iterator[bytes] | None:
        key = self._key(path)
        with self._errors("read", path):
            try:
                size = obstore.head(self._store, key)["size"]
            except _ABSENT:
                return None

        def piece(start: int) -> bytes:
            with self._errors("read", path):
                return bytes(obstore.get_range(self._store, key, start=start, end=min(start + _PART, size)))

        return self._ahead(piece, range(0, size, _PART))

    def list(self, prefix: str) -> Iterator[Entry]:
        base = prefix.strip("/")
        where = self._prefix + (check_path(base) if base else "")
        cut = len(self._prefix)
        with self._errors("list", prefix):
            for page in obstore.list(self._store, where or None, chunk_size=1000):
                for meta in page:
                    yield Entry(meta["path"][cut:], meta["size"], meta["last_modified"].timestamp())

    def delete(self, path: str) -> None:
        with self._errors("delete", path):
            try:
                obstore.delete(self._store, self._key(path))
            except _ABSENT:
                return

    def _touch(self) -> float:
        self.put("clock", b"")
        with self._errors("read", "clock"):
            return float(obstore.head(self._store, self._key("clock"))["last_modified"].timestamp())

    def _ahead(self, piece: Callable[[int], bytes], starts: Sequence[int]) -> Iterator[bytes]:
        """Yield pieces in order with a few requests in flight; one connection alone would not fill a fast network.

        Pieces, because a whole large object would outlast the client's time limit.
        """
        if len(starts) <= 1:
            yield from map(piece, starts)
            return
        with ThreadPoolExecutor(_READ_AHEAD, thread_name_prefix="range") as pool:
            waiting: deque[Future[bytes]] = deque()
            for start in starts:
                waiting.append(pool.submit(piece, start))
                if len(waiting) == _READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _key(self, path: str) -> str:
        return self._prefix + check_path(path)

    def _conditional(self, path: str, data: bytes, write: Callable[[], bool]) -> bool:
        """Retry `write` with jitter; a False that follows an unknown outcome may be our own success."""
        unknown = False
        deadline = time.monotonic() + self._patience
        for attempt in range(1000):
            try:
                if write():
                    return True
                return unknown and self.get(path) == data
            except _FINAL as error:
                raise self._failure("write", path, error) from error
            except (exceptions.BaseError, OSError) as error:
                unknown = True
                pause = random.uniform(0.05, min(5.0, 0.1 * 2**attempt))
                if time.monotonic() + pause > deadline:
                    raise self._failure("write", path, error) from error
                time.sleep(pause)
        raise StoreError(f"cannot write {path} in {self.url}")

    def _check_bucket(self, error: Exception) -> None:
        """An absent bucket is an error, not an absent object."""
        if "NoSuchBucket" in str(error):
            raise self._failure("read", "", error) from error

    def _errors(self, action: str, path: str = "") -> _Errors:
        return _Errors(self, action, path)

    def _failure(self, action: str, path: str, error: Exception) -> StoreError:
        text = str(error)
        code = _first(r"<Code>(\w+)</Code>", text)
        status = _first(r"status:? (\d{3})", text) or _first(r"\b([45]\d\d) [A-Z][a-z]+", text)
        endpoint = _endpoint() or "AWS"
        transient = False
        if not self._keys_found and not code and status in ("", "401", "403"):
            cause, hint = f"no credentials were found for {endpoint}", _CREDENTIALS
        elif code == "NoSuchBucket":
            cause, hint = "the bucket does not exist", "create the bucket, or correct its name"
        elif isinstance(error, _REFUSED) or status in ("401", "403"):
            cause = f"{endpoint} refused the credentials" + (f" ({code})" if code else "")
            hint = f"{_CREDENTIALS} that may read and write this bucket"
        elif code or status:
            cause = f"{endpoint} answered {' '.join(filter(None, (status, code)))}"
            hint = "try again later, or ask who runs the object store"
            transient = status.startswith("5")
        else:
            cause = f"{endpoint} could not be reached: {_root_cause(text)}"
            hint = "check AWS_ENDPOINT_URL, the network and that the server runs; then: moegrid resume"
            transient = True
        what = "open the store" if action == "open" else f"{action} {path or 'an object'}"
        failure = StoreError(f"cannot {what} in {self.url}", cause=cause, hint=hint)
        failure.transient = transient
        return failure


class _Errors:
    """Turn obstore's exceptions into StoreError, without what they quote of requests and signatures."""

    def __init__(self, objects: BucketObjects, action: str, path: str) -> None:
        self._objects, self._action, self._path = objects, action, path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (exceptions.BaseError, NotImplementedError, FileNotFoundError, PermissionError)):
            raise self._objects._failure(self._action, self._path, error) from None


class _Hashed:
    """The bytes of a file in pieces; `size` and `sha256` are of what was handed out in the last pass."""

    def __init__(self, source: Path, piece: int) -> None:
        self._source, self._piece = source, piece
        self.size = 0
        self.sha256: Any = hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        self.size, self.sha256 = 0, hashlib.sha256()
        with self._source.open("rb", buffering=0) as file:
            while piece := file.read(self._piece):
                self.sha256.update(piece)
                self.size += len(piece)
                yield piece


def _s3(bucket: str, patience: float, *, retries: int) -> S3Store:
    endpoint = _endpoint()
    client: ClientConfig = {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=min(5.0, patience)),
        "timeout": timedelta(seconds=REQUEST_SECONDS),
    }
    retry: RetryConfig = {
        "max_retries": retries,
        "retry_timeout": timedelta(seconds=patience),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
    }
    profile = {} if os.environ.get("AWS_ACCESS_KEY_ID") else _profile()
    config: dict[str, object] = {"region": "us-east-1", **profile}
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        config["region"] = region
    if endpoint:
        config["endpoint"] = endpoint
    return S3Store(bucket, config=config, client_options=client, retry_config=retry)


def _endpoint() -> str:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        if os.environ.get(name):
            return os.environ[name].rstrip("/")
    return ""


def _profile() -> dict[str, str]:
    """Return the keys of the standard AWS files' profile; roles of a machine or container are obstore's own affair."""
    home = Path.home() / ".aws"
    name = os.environ.get("AWS_PROFILE", "default")
    credentials, config = configparser.RawConfigParser(), configparser.RawConfigParser()
    credentials.read(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials"))
    config.read(os.environ.get("AWS_CONFIG_FILE", home / "config"))
    found: dict[str, str] = {}
    for parser, section in ((config, name if name == "default" else f"profile {name}"), (credentials, name)):
        if parser.has_section(section):
            found |= dict(parser.items(section))
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
        "region": "region",
    }
    return {names[key]: value for key, value in found.items() if key in names}


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else ""


def _root_cause(text: str) -> str:
    """Return the last short phrase of an error chain, without what obstore prints for its own debugging."""
    head = text.split("Debug source:")[0].strip()
    return head.rsplit(": ", 1)[-1][:120] if head else "no answer"


def open_bucket(url: str, patience: float, prepare: bool) -> BucketObjects:
    """Open a bucket, or memory; there is nothing to prepare."""
    return BucketObjects(url, patience=patience)
