"""Where data comes from (`wheel://NAME==VERSION/SET`, `hub://ORG/NAME`, `file://PATH`) and the digest that pins it."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path

from orchestrator.spec.pins import WHEELS
from orchestrator.spec.problems import Mistake, did_you_mean

_WHEEL = re.compile(r"^wheel://([A-Za-z0-9._-]+)(?:==([^/]+))?(?:/(.*))?$")
_HUB = re.compile(r"^hub://[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?$")


def source_digest(source: str, revision: str, folder: Path) -> str:
    """Return the content digest of `source`: the wheel's or the file's sha256, or the hub revision.

    A relative `file://` path is sought in `folder`. Raises Mistake when the source is unknown, missing or not pinned.
    """
    if source.startswith("wheel://"):
        return _wheel(source)
    if source.startswith("hub://"):
        if not _HUB.match(source):
            raise Mistake(f"source {source!r} is no hub data set", "write hub://ORG/NAME")
        if not revision:
            raise Mistake(f"source {source!r} is not pinned", "set revision to a commit of the data set")
        return revision
    if source.startswith("file://"):
        path = folder / Path(source.removeprefix("file://")).expanduser()
        if not path.is_file():
            raise Mistake(f"source {source!r} does not exist", f"looked for {path}")
        stat = path.stat()
        return _file_sha256(str(path.resolve()), stat.st_mtime_ns, stat.st_size)
    raise Mistake(
        f"source {source!r} is of no known kind", "write wheel://NAME==VERSION/SET, hub://ORG/NAME or file://PATH"
    )


def _wheel(source: str) -> str:
    match = _WHEEL.match(source)
    name, version, data_set = match.groups() if match else ("", None, None)
    if name not in WHEELS:
        raise Mistake(f"source {source!r}: wheel {name!r} is not pinned", did_you_mean(name, WHEELS, "pinned wheels"))
    wheel = WHEELS[name]
    if version != wheel.version:
        raise Mistake(
            f"source {source!r}: version {version or 'none'} of {name} is not pinned",
            f"write {wheel.url}/{data_set or wheel.sets[0]}",
        )
    if data_set not in wheel.sets:
        raise Mistake(
            f"source {source!r}: {name} has no set {data_set or ''!r}", did_you_mean(data_set, wheel.sets, "sets")
        )
    return wheel.sha256


@lru_cache(maxsize=256)
def _file_sha256(path: str, modified: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
