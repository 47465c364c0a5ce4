"""Independent pieces of work on a process's cores: one core for each piece, not all cores for each kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Barrier

import torch

# Fewer rows are done before another thread is awake. A tenth of a piece's time is Python, which one thread runs at a
# time: many would wait for each other.
FEWEST_ROWS, MOST_THREADS = 1024, 4


def threads_for(rows: int) -> int:
    """Return how many threads share work on `rows` rows; 1 = the kernels themselves use all cores."""
    threads = torch.get_num_threads()
    return threads if threads <= MOST_THREADS and rows >= FEWEST_ROWS else 1


def for_each(work: Callable[[int], None], sizes: Sequence[int]) -> None:
    """Call `work(i)` for every i whose `sizes[i]`, the rows of its piece, is not 0.

    Pieces write to memory of their own, so no bit depends on the thread that takes one. Kernels between which little
    happens leave the other cores asleep half of the time; a piece's kernels follow each other on one core.
    """
    threads, pieces = threads_for(sum(sizes)), [i for i, size in enumerate(sizes) if size]
    if threads == 1 or len(pieces) < threads:
        for i in pieces:
            work(i)
        return
    # The largest first; whoever is free takes the next one.
    rest: SimpleQueue[int] = SimpleQueue()
    for i in sorted(pieces, key=lambda i: -sizes[i]):
        rest.put(i)
    inference = torch.is_inference_mode_enabled()

    def take() -> None:
        with torch.inference_mode(inference), torch.no_grad(), suppress(Empty):
            while True:
                work(rest.get_nowait())

    torch.set_num_threads(1)
    try:
        others = [_helpers().submit(take) for _ in range(threads - 1)]
        try:
            take()
        finally:
            started = [other for other in others if not other.cancel()]
            wait(started)
    finally:
        torch.set_num_threads(threads)
    for other in started:
        other.result()


_pool: ThreadPoolExecutor | None = None


def _helpers() -> ThreadPoolExecutor:
    """Return the threads that help, each with one core for its kernels.

    They are all there before they are used: setting a thread's cores also sets MKL's for the whole process, which must
    not happen once the caller has its own again.
    """
    global _pool
    if _pool is None:
        helpers = MOST_THREADS - 1
        _pool = ThreadPoolExecutor(helpers, "pieces", initializer=torch.set_num_threads, initargs=(1,))
        meeting = Barrier(helpers)
        wait([_pool.submit(meeting.wait) for _ in range(helpers)])
    return _pool


def _forget() -> None:
    global _pool
    _pool = None


# A forked process has no threads but the one that forked it.
os.register_at_fork(after_in_child=_forget)
