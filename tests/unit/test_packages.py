"""Pinned packages of pip, npm and apt: fetched by their own client, verified, laid by hand, read without unpacking."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import stat
import tarfile
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.data import archives, fetching
from jobs.data.archives import files_of
from jobs.data.fetching import cache_directory, fetch, parse_package
from orchestrator.catalog.pins import PACKAGES, Package
from orchestrator.data.pinning import pin
from orchestrator.errors import SourceError
from orchestrator.files.problems import Mistake
from orchestrator.spec.cell import DataSpec

CONTENT = b"content"


def package(scheme: str, content: bytes = CONTENT) -> Package:
    version = {"wheel": "1", "npm": "1.0.0", "deb": "1:1-2"}[scheme]
    return Package("data", version, hashlib.sha256(content).hexdigest(), ("items",), scheme=scheme)


# What each client leaves in its working directory for the package above.
NAMES = {"wheel": "data-1-py3-none-any.whl", "npm": "data-1.0.0.tgz", "deb": "data_1%3a1-2_all.deb"}
SCHEMES = tuple(NAMES)


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Clients that write the package into their working directory; the list is what was asked of them."""
    monkeypatch.setenv("MOEGRID_CACHE", str(tmp_path / "cache"))
    asked = tmp_path / "asked"
    program = tmp_path / "client"
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nprintf content > "$NAME"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    changed = {
        scheme: fetching.Client(
            **{name: getattr(client, name) for name in client.__slots__} | {"command": (str(program),)}
        )
        for scheme, client in fetching.CLIENTS.items()
    }
    monkeypatch.setattr(fetching, "CLIENTS", changed)

    def begin(scheme: str) -> Path:
        monkeypatch.setenv("NAME", NAMES[scheme])
        return asked

    return begin


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_package_is_fetched_once_by_many_at_a_time(client, scheme):
    asked = client(scheme)
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(package(scheme)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (line,) = asked.read_text().splitlines()
    assert line.split()[-1] == {"wheel": "data==1", "npm": "data@1.0.0", "deb": "data=1:1-2"}[scheme]
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == CONTENT
    assert ":" not in paths[0].name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_package_of_other_content_is_refused_and_not_kept(client, scheme):
    client(scheme)
    with pytest.raises(SourceError, match="not the pinned one"):
        fetch(package(scheme, b"other"))
    assert not [path for path in cache_directory(scheme).iterdir() if path.suffix != ".lock"]


def test_a_damaged_cached_package_is_fetched_again(client):
    asked = client("npm")
    fetch(package("npm")).write_bytes(b"damaged")
    assert fetch(package("npm")).read_bytes() == CONTENT
    assert len(asked.read_text().splitlines()) == 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_node_reads_what_was_laid_there_by_hand(tmp_path, monkeypatch, scheme):
    """Under the name that the client gives it, where there is neither client nor network."""
    monkeypatch.setenv("MOEGRID_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    laid = cache_directory(scheme) / NAMES[scheme]
    laid.write_bytes(CONTENT)
    assert fetch(package(scheme)) == laid
    laid.write_bytes(b"something else")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourceError, match="could not be fetched"):
        fetch(package(scheme))


@pytest.mark.parametrize("scheme, words", [("npm", "npm pack data@1.0.0"), ("deb", "apt-get download data=1:1-2")])
def test_without_its_client_the_command_that_fills_the_folder_is_told(tmp_path, monkeypatch, scheme, words):
    monkeypatch.setenv("MOEGRID_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="could not be fetched") as caught:
        fetch(package(scheme))
    assert "cannot be started" in caught.value.cause
    assert words in caught.value.hint
    assert str(cache_directory(scheme)) in caught.value.hint
    assert caught.value.exit_code == 3


def test_a_wheel_that_no_index_has_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEGRID_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourceError, match="could not be fetched") as caught:
        fetch(Package("no-such-wheel-of-moegrid", "1.0", "0" * 64, ()))
    assert "PIP_INDEX_URL" in caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "scheme, says, hint",
    [
        ("npm", "npm error code E404\nnpm error 404  'data@1.0.0' is not in this registry.", "npm config get registry"),
        ("npm", "npm error code ENOTFOUND\nnpm error network no such host", "check the network and npm's settings"),
        ("deb", "E: Version '1:1-2' for 'data' was not found", "apt-get update"),
        ("deb", "E: Failed to fetch: could not resolve", "check the network and apt's sources"),
    ],
)
def test_what_a_client_complains_of_is_told_with_its_remedy(tmp_path, monkeypatch, client, scheme, says, hint):
    client(scheme)
    program = Path(fetching.CLIENTS[scheme].command[0])
    program.write_text(f'#!/bin/sh\necho "{says}" >&2\nexit 1\n')
    with pytest.raises(SourceError, match="could not be fetched") as caught:
        fetch(package(scheme))
    assert caught.value.cause in says
    assert hint in caught.value.hint
    assert "by hand" in caught.value.hint or "copy the file" in caught.value.hint


def test_a_grid_names_a_package_by_its_version_and_set(tmp_path):
    google = PACKAGES["npm", "emoji-datasource-google"]
    pinned = pin(DataSpec(f"{google.url}/questions", format="vision"), tmp_path)
    assert pinned.digest == google.sha256
    for source, form, message in (
        ("npm://emoji-datasource-googel@16.0.0/questions", "vision", "is not pinned"),
        ("npm://emoji-datasource-google@15.0.0/questions", "vision", "version 15.0.0 of emoji-datasource-google"),
        ("npm://emoji-datasource-google@16.0.0/question", "vision", "has no set 'question'"),
        ("npm://emoji-datasource-google@16.0.0/questions", "text", "holds vision data, not text"),
        ("deb://openclipart-png=1:0.18+dfsg-19/questions", "vision", "has no set 'questions'"),
        ("deb://openclipart-png/items", "items", "version none of openclipart-png"),
        ("deb://emoji-datasource-google=16.0.0/items", "items", "is not pinned"),
    ):
        with pytest.raises(Mistake, match=message):
            pin(DataSpec(source, format=form), tmp_path)
    assert parse_package("deb://openclipart-png=1:0.18+dfsg-19/items")[1] == "items"
    with pytest.raises(SourceError, match="not a built-in data set"):
        parse_package(f"{google.url}/poems")


def tar_of(files: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in others:
            archive.addfile(member)
    return sink.getvalue()


def deb_of(data: bytes, name: str) -> bytes:
    """Return a Debian package: an `ar` archive of three members, each padded to an even length."""
    found = b"!<arch>\n"
    for member, content in ((b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (name.encode(), data)):
        found += member.ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"100644".ljust(8)
        found += str(len(content)).encode().ljust(10) + b"`\n" + content + b"\n" * (len(content) % 2)
    return found


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACKED = {
    "a.tgz": gzip.compress,
    "a.deb": lambda data: deb_of(lzma.compress(data), "data.tar.xz"),
    "zst.deb": lambda data: deb_of(zstd(data), "data.tar.zst"),
    "gz.deb": lambda data: deb_of(gzip.compress(data), "data.tar.gz/"),
}


@pytest.mark.parametrize("name", PACKED)
def test_the_files_of_an_archive_are_read_whoever_packed_it(tmp_path, name):
    files = {"./usr/a.png": b"a" * 1000, "./usr/b.txt": b"b", "./usr/c.png": b""}
    path = tmp_path / name
    path.write_bytes(PACKED[name](tar_of(files)))
    assert dict(files_of(path, lambda inside: inside.endswith(".png"))) == {"usr/a.png": b"a" * 1000, "usr/c.png": b""}
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "a/../../out.png", "c:\\out.png", "C:/out.png"])
def test_an_archive_with_a_path_that_leads_out_of_it_is_refused(tmp_path, name):
    path = tmp_path / "a.tgz"
    path.write_bytes(gzip.compress(tar_of({name: b"x"})))
    with pytest.raises(SourceError, match="leads out of it"):
        dict(files_of(path, lambda inside: True))


def test_links_and_devices_are_no_files(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    others = []
    for kind, name in (
        (tarfile.SYMTYPE, "soft"),
        (tarfile.LNKTYPE, "hard"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.FIFOTYPE, "fifo"),
    ):
        member = tarfile.TarInfo(f"{name}.png")
        member.type, member.linkname = kind, str(secret) if name == "soft" else "a.png"
        others.append(member)
    path = tmp_path / "a.tgz"
    path.write_bytes(gzip.compress(tar_of({"a.png": b"a"}, *others)))
    assert dict(files_of(path, lambda inside: True)) == {"a.png": b"a"}


def test_what_an_archive_holds_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "a.tgz"
    path.write_bytes(gzip.compress(tar_of({f"{n}.png": bytes(2000) for n in range(5)})))
    assert os.path.getsize(path) < 400, "zeros that were packed well"
    for bound, value, message in (
        ("FILE_BYTES", 1999, "of 0 MiB"),
        ("ARCHIVE_BYTES", 9000, "holds more than"),
        ("MEMBERS", 4, "more than 4 members"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(archives, bound, value)
            with pytest.raises(SourceError, match=message):
                dict(files_of(path, lambda inside: True))
    assert len(dict(files_of(path, lambda inside: True))) == 5


@pytest.mark.parametrize("name", PACKED)
def test_a_damaged_archive_is_told_wherever_it_is_cut_or_altered(tmp_path, name):
    whole = PACKED[name](tar_of({f"{n}.png": os.urandom(3000) for n in range(4)}))
    path = tmp_path / name
    for cut in (0, 5, 30, len(whole) // 3, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:cut])
        with pytest.raises(SourceError, match="is damaged") as caught:
            dict(files_of(path, lambda inside: True))
        assert caught.value.cause
    path.write_bytes(b"\x00" * len(whole))
    with pytest.raises(SourceError, match="is damaged"):
        dict(files_of(path, lambda inside: True))
