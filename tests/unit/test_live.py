"""What is drawn below the events of a run on a terminal."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.ui.console import Console
from orchestrator.ui.live import Progress


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not what() and time.monotonic() < end:
        time.sleep(0.02)


def test_a_notice_of_a_signal_handler_is_shown_at_once_and_stays_among_the_events() -> None:
    stream = Terminal()
    view = Progress(build_graph(load_grid("quickstart")), Console(stream), lambda _: None, lambda _: "local")
    assert not view.notice("too early"), "nothing is redrawn yet: the caller has to write it"
    with view:
        assert view.notice("stopping: running stages save their states")
        wait_for(lambda: "stopping: running stages" in stream.getvalue())
        assert "stopping: running stages" in stream.getvalue(), "before any tick"
    last = stream.getvalue()
    assert "stop" in last[last.rindex("stopping: running stages") - 40 :], "and it stays when the block is gone"
    assert "too early" not in last
