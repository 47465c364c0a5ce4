"""What every rank says is known to all of them before any can act on it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import TCPStore

from jobs.node import ranks
from orchestrator.errors import LeaseLost

RANKS = 3


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    monkeypatch.setattr(ranks, "_meeting", store)
    return store


def test_all_hear_all_words_and_the_first_rank_is_the_last_to_go_on(meeting: TCPStore) -> None:

    def one(rank: int) -> list[str]:
        time.sleep(0.3 * rank)
        words = ranks.said("name", f"word {rank}" if rank else "", rank, RANKS)
        if not rank:
            assert meeting.check([f"heard/name/{other}" for other in range(1, RANKS)])
        return words

    with ThreadPoolExecutor(RANKS) as executor:
        assert list(executor.map(one, range(RANKS))) == [["", "word 1", "word 2"]] * RANKS


def test_who_waits_for_a_word_still_sees_that_its_work_is_lost(meeting: TCPStore) -> None:
    def check() -> None:
        raise LeaseLost("taken over")

    with pytest.raises(LeaseLost):
        ranks.said("name", "", 0, RANKS, check)


def test_alone_there_is_nobody_to_wait_for() -> None:
    assert ranks.said("name", "word", 0, 1) == ["word"]
