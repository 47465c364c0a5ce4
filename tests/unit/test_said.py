"""What every rank says is known to all of them before any can act on it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
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


def test_a_thread_that_waits_for_others_files_keeps_no_rank_from_speaking(meeting: TCPStore) -> None:
    with ThreadPoolExecutor(1) as background:
        waiting = background.submit(ranks.told, ["state/1", "state/2"], 20.0)
        time.sleep(0.5)
        before = time.monotonic()
        meeting.set("said/name/1", "word")
        meeting.set("heard/name/1", "")
        assert ranks.said("name", "", 0, 2) == ["", "word"]
        assert time.monotonic() - before < 5.0
        assert not waiting.done()
        meeting.set("state/2", "second")
        meeting.set("state/1", "first")
        assert waiting.result() == [b"first", b"second"]


def test_what_never_comes_is_waited_for_so_long_and_no_longer(meeting: TCPStore) -> None:
    with pytest.raises(dist.DistStoreError):
        ranks.told(["never"], 0.2)
