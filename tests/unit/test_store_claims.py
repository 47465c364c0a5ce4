"""Claims: one holder at a time, tokens only grow, whoever lost a lease finds out before it commits."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from orchestrator.errors import LeaseLost
from orchestrator.store import Store


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}")


def test_a_live_lease_keeps_others_out(store: Store) -> None:
    assert store.claims.claim("stage", "a-0", 60) is not None
    assert store.claims.claim("stage", "b-0", 60) is None
    state = store.claims.states(["stage", "unclaimed"])
    assert set(state) == {"stage"}
    assert (state["stage"].attempt, state["stage"].live, state["stage"].entered) == ("a-0", True, False)


def test_the_holder_gets_its_lease_again(store: Store) -> None:
    assert store.claims.claim("stage", "a-0", 60) == store.claims.claim("stage", "a-0", 60)


def test_released_and_expired_leases_are_taken_over_with_the_next_token(store: Store) -> None:
    first = store.claims.claim("stage", "a-0", 60)
    assert first is not None
    store.claims.release(first)
    second = store.claims.claim("stage", "b-0", ttl=0.0)
    assert second is not None
    third = store.claims.claim("stage", "c-0", 60)
    assert third is not None
    assert [first.token, second.token, third.token] == [1, 2, 3]
    for lease in (first, second):
        with pytest.raises(LeaseLost, match="does not hold"):
            store.claims.check(lease)
    store.claims.check(third)


def test_one_process_of_an_attempt_enters_and_its_duplicate_does_not(store: Store) -> None:
    claimed = store.claims.claim("stage", "a-0", 60)
    assert claimed is not None
    lease = store.claims.enter("stage", "a-0")
    assert lease.token == claimed.token + 1
    with pytest.raises(LeaseLost):
        store.claims.check(claimed)
    with pytest.raises(LeaseLost, match="another process of this attempt"):
        store.claims.enter("stage", "a-0")
    store.claims.check(lease)
    store.claims.release(lease)
    with pytest.raises(LeaseLost):
        store.claims.enter("stage", "a-0")


def test_nobody_enters_what_is_not_theirs(store: Store) -> None:
    with pytest.raises(LeaseLost, match="nobody claimed it"):
        store.claims.enter("stage", "a-0")
    store.claims.claim("stage", "a-0", 60)
    with pytest.raises(LeaseLost, match="belongs to a-0"):
        store.claims.enter("stage", "b-0")


def test_a_lease_that_ran_out_in_the_queue_can_still_be_entered(store: Store) -> None:
    store.claims.claim("stage", "a-0", ttl=0.0)
    store.claims.check(store.claims.enter("stage", "a-0"))


def test_a_reopened_lease_can_be_entered_again(store: Store) -> None:
    store.claims.claim("stage", "a-0", 60)
    store.claims.release(store.claims.enter("stage", "a-0"), reopen=True)
    store.claims.check(store.claims.enter("stage", "a-0"))


def test_a_stalled_attempt_finds_its_lease_taken(store: Store) -> None:
    store.claims.claim("stage", "a-0", ttl=0.0)
    stalled = store.claims.enter("stage", "a-0")
    taken = store.claims.claim("stage", "b-0", 60)
    assert taken is not None
    for action in (store.claims.check, store.claims.renew):
        with pytest.raises(LeaseLost):
            action(stalled)
    store.claims.release(stalled)
    assert store.claims.states()["stage"].attempt == "b-0"
    assert store.claims.states()["stage"].live


def test_renewal_makes_a_lease_young(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    lease = store.claims.claim("stage", "a-0", 60)
    assert lease is not None
    os.utime(tmp_path / "claims" / "stage.json", (1e9, 1e9))
    assert not store.claims.states()["stage"].live
    store.claims.renew(lease)
    assert store.claims.states()["stage"].live
    assert store.claims.states()["stage"].age < 60
    store.claims.check(lease)


def test_many_at_once(store: Store) -> None:
    leases = store.claims.claim_many([(f"s{i}", "a-0") for i in range(20)], 60)
    assert all(leases)
    assert len(store.claims.states()) == 20


def test_a_claim_emptied_by_a_power_cut_does_not_block(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    lease = store.claims.claim("stage", "a-0", 60)
    assert lease is not None
    (tmp_path / "claims" / "stage.json").write_bytes(b"")
    with pytest.raises(LeaseLost):
        store.claims.check(lease)
    assert store.claims.claim("stage", "b-0", 60) is not None
