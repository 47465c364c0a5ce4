"""What a node keeps of a remote store serves its stages, whatever others do to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.node.context import StageContext
from tests.training import TOKENIZER, init_work, make_job, prepare


def test_a_cache_that_others_prune_or_own_serves_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGRID_CACHE", str(tmp_path))
    tmp_path.joinpath("locks").write_text("")  # no lock can be made in it

    def fetched(by: str) -> Path:
        store = prepare(f"memory://node-cache-of-{by}")
        return StageContext(make_job(store, [init_work()]), init_work().key()).fetch(TOKENIZER, "special.json")

    path = fetched("one")
    real = os.utime
    pruned: list[Path] = []

    def deleted_first(file: Path) -> None:
        if not pruned:
            pruned.append(file)
            path.unlink()
        real(file)

    monkeypatch.setattr("jobs.node.cache.os.utime", deleted_first)
    assert fetched("another").read_bytes() == b"{}"
    assert pruned == [path]

    def refused(file: Path) -> None:
        raise PermissionError(file)

    monkeypatch.setattr("jobs.node.cache.os.utime", refused)
    assert fetched("third").read_bytes() == b"{}"
