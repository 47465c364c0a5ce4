"""A store of another package, by the scheme of its address: drivers and jobs find the same objects."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import MoegridError, StoreError
from orchestrator.store import Store
from tests.faults.harness import Lab
from tests.packages import found, install

VAULTS = '''
from pathlib import Path

from orchestrator.catalog.stores import StoreKind
from orchestrator.store.local import LocalObjects


class Vault(LocalObjects):
    """A folder whose blobs no other process can read as files."""

    def local_path(self, path):
        return None


def open_vault(url, patience, prepare):
    vault = Vault(Path(url.removeprefix("vault://")), prepare=prepare)
    vault.url = url
    return vault


VAULT = StoreKind("vault", "vaults:open_vault")
EMPTY = StoreKind("empty", "vaults:nothing")
'''


@pytest.fixture
def vaults(tmp_path: Path) -> Iterator[Path]:
    install(tmp_path / "site", "vaults", VAULTS, {"stores": {"vault": "vaults:VAULT", "empty": "vaults:EMPTY"}})
    with found(tmp_path / "site", "vaults") as folder:
        yield folder


def test_a_grid_runs_on_it(tmp_path: Path, vaults: Path) -> None:
    lab = Lab(tmp_path, {"PYTHONPATH": str(vaults)}, url=f"vault://{tmp_path}/vault")
    try:
        code, said = lab.drive()
        assert code == 0, said
        results = lab.results()
        assert results
        assert lab.store().url == f"vault://{tmp_path}/vault"
        executed = len(lab.executions())
        code, said = lab.drive("resume")
        assert code == 0, said
        assert len(lab.executions()) == executed > 0, "another driver finds all that is done"
    finally:
        lab.close()


@pytest.mark.usefixtures("vaults")
def test_an_address_that_nobody_has_is_told_with_the_nearest(tmp_path: Path) -> None:
    assert not Store.peek(f"vault://{tmp_path}/none").exists
    assert not (tmp_path / "none").exists()
    with pytest.raises(StoreError, match="unknown kind of store: vaul://") as caught:
        Store.open("vaul://x")
    assert caught.value.hint == "did you mean 'vault'?"
    with pytest.raises(MoegridError, match=r"the code of store 'empty' of vaults 1.2 cannot be imported"):
        Store.open("empty://x")


def test_ours_look_at_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: pytest.fail("it scanned"))
    for url in (str(tmp_path / "a"), f"file://{tmp_path}/b", "memory://c"):
        assert Store.open(url).exists
