"""Progress while a grid runs: a line per event, and per running job its step, loss, speed and time left.

On a terminal the running jobs are a block that is redrawn below the events; elsewhere they are lines, now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.engine.loop import Snapshot
from orchestrator.engine.retry import decide
from orchestrator.errors import MoegridError
from orchestrator.plan.graph import StageGraph
from orchestrator.store.attempts import Failure, Heartbeat
from orchestrator.ui.console import Console, columns, duration, quantity

if TYPE_CHECKING:
    from rich.console import RenderableType

HEARTBEAT_SECONDS = 1.0
LINE_SECONDS = 15.0
_FREE = ("preempted", "killed", "node_lost", "unreachable")


@dataclass(frozen=True, slots=True)
class Running:
    """One running job as its last heartbeat tells it; times in seconds."""

    attempt: str
    stage: str
    label: str
    step: int = 0
    total: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    left: float | None = None
    host: str = ""
    site: str = ""
    job: str = ""
    age: float = 0.0

    def words(self) -> list[str]:
        """Return label, site, progress, loss, speed and time left as columns."""
        return [
            self.label,
            self.site,
            f"{self.step}/{self.total}" if self.total else "starting" if not self.age else "working",
            f"loss {self.loss:.4g}" if self.loss is not None else "",
            f"{quantity(self.tokens_per_second)} tokens/s" if self.tokens_per_second else "",
            f"{duration(self.left)} left" if self.left is not None else "",
        ]


def stage_name(graph: StageGraph, key: str) -> str:
    """Return a stage's label with the cell it belongs to, or how many share it."""
    users = graph.users[key]
    if len(users) == 1:
        return f"{graph.stages[key].label} [{graph.cell(users[0]).name}]"
    return f"{graph.stages[key].label} [{len(users)} cells]"


class Pace:
    """Steps per second of running stages, from the heartbeats seen so far."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], tuple[float, int]] = {}

    def rate(self, attempt: str, beat: Heartbeat) -> float:
        """Return steps per second since the first heartbeat of this attempt at its present stage, 0 if unknown."""
        if not beat.step:
            return 0.0
        began, first = self._first.setdefault((attempt, beat.stage), (beat.time, beat.step))
        return (beat.step - first) / (beat.time - began) if beat.step > first and beat.time > began else 0.0


def running(
    graph: StageGraph, attempt: str, stages: list[str], beat: Heartbeat | None, pace: Pace, site: str, job: str = ""
) -> Running:
    """Describe one job from its stages, its last heartbeat, its site and the scheduler's name for it."""
    beat = beat or Heartbeat()
    stage = beat.stage or (stages[0] if stages else "")
    rate = pace.rate(attempt, beat)
    return Running(
        attempt=attempt,
        stage=stage,
        label=stage_name(graph, stage) if stage in graph.stages else stage[:12],
        step=beat.step,
        total=beat.total,
        loss=beat.loss,
        tokens_per_second=beat.tokens_per_second,
        left=(beat.total - beat.step) / rate if rate and beat.total else None,
        host=beat.host,
        site=site,
        job=job,
        age=max(0.0, time.time() - beat.time) if beat.time else 0.0,
    )


class Progress:
    """Shows snapshots. `heartbeat` reads the last heartbeat of an attempt, `site` tells where it runs."""

    def __init__(
        self,
        graph: StageGraph,
        console: Console,
        heartbeat: Callable[[str], Heartbeat | None],
        site: Callable[[str], str],
    ) -> None:
        self._graph = graph
        self._console = console
        self._heartbeat = heartbeat
        self._site = site
        self._began = time.monotonic()
        self._read = 0.0
        self._lines = 0.0
        self._last: list[Running] = []
        self._live: Any = None
        self._away = ""
        self._notice = ""
        self._shown: RenderableType = ""
        self._pace = Pace()

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            from rich.console import Console as RichConsole
            from rich.live import Live

            rich = RichConsole(file=self._console.stream, no_color=not self._console.colour, highlight=False)
            self._live = Live(get_renderable=self._render, console=rich, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._say_notice()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def notice(self, text: str) -> bool:
        """Show a line below the running jobs at once, and among the events at the next tick; safe in a signal handler.

        Returns False where nothing is redrawn: a line written elsewhere would leave stale ones behind.
        """
        self._notice = text if self._live is not None else ""
        return self._live is not None

    def show(self, snapshot: Snapshot) -> None:
        """Print what happened since the last snapshot and how the running jobs are."""
        self._say_notice()
        if self._away:
            self._say("again", "store and scheduler answer", "green")
            self._away = ""
        for key in snapshot.finished:
            self._say("done", stage_name(self._graph, key), "green")
        for failure in snapshot.failed:
            self._failure(failure, snapshot)
        for key in snapshot.lost:
            name = stage_name(self._graph, key)
            self._say("repair", f"{name}: its damaged files were made again with other bytes; so is it", "yellow")
        for label in snapshot.submitted:
            self._say("start", label, "blue")
        now = time.monotonic()
        if now - self._read >= HEARTBEAT_SECONDS:
            self._read = now
            by_attempt: dict[str, list[str]] = {}
            for stage in self._graph.stages:
                if stage in snapshot.busy:
                    by_attempt.setdefault(snapshot.busy[stage], []).append(stage)
            self._last = [
                running(self._graph, attempt, stages, self._heartbeat(attempt), self._pace, self._site(attempt))
                for attempt, stages in by_attempt.items()
            ]
        if self._live is not None:
            self._shown = self._block(snapshot)
            self._live.refresh()
        elif self._last and now - self._lines >= LINE_SECONDS:
            self._lines = now
            for line in columns([job.words() for job in self._last]):
                self._say("", f"{line}")

    def trouble(self, error: MoegridError) -> None:
        """Say once that store or scheduler are away."""
        if error.error != self._away:
            self._away = error.error
            cause = f" ({error.cause})" if error.cause else ""
            self._say("wait", f"{error.error}{cause}; running jobs go on, trying again", "yellow")

    def note(self, text: str) -> None:
        """Print one line."""
        self._say("", text, "yellow")

    def _failure(self, failure: Failure, snapshot: Snapshot) -> None:
        again = decide(list(snapshot.failures.get(failure.stage, ()))).retry
        name = stage_name(self._graph, failure.stage)
        if failure.kind == "corrupt" and again:
            self._say("repair", f"{name}: {failure.message}; the damaged artifact is made again", "yellow")
        elif again:
            where = f" from step {failure.step}" if failure.step else ""
            self._say("retry", f"{name}: {failure.message}; going on{where}", "yellow")
        else:
            self._say("FAILED", f"{name}: {failure.kind}: {failure.message}", "red")

    def _say(self, word: str, text: str, colour: str = "") -> None:
        elapsed = int(time.monotonic() - self._began)
        head = f"{elapsed // 60:3d}:{elapsed % 60:02d}  {word:<7}"
        line = f"{self._console.style(head, colour) if colour else head} {text}"
        if self._live is not None:
            from rich.text import Text

            self._live.console.print(Text.from_ansi(line), soft_wrap=True)
        else:
            self._console.print(line)

    def _say_notice(self) -> None:
        notice, self._notice = self._notice, ""
        if notice:
            self._say("stop", notice, "yellow")

    def _render(self) -> RenderableType:
        """Return what is redrawn: the running jobs, and a notice that is not among the events yet."""
        from rich.console import Group

        return Group(self._shown, self._notice) if self._notice else self._shown

    def _block(self, snapshot: Snapshot) -> RenderableType:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for job in self._last:
            table.add_row(*job.words())
        counts = snapshot.plan.counts()
        total = sum(counts.values())
        waiting = snapshot.plan.left - len(snapshot.busy)
        table.add_row(
            f"{counts['done']}/{total} stages done, {len(snapshot.busy)} running, {max(0, waiting)} waiting"
            + (f", {counts['blocked']} blocked" if counts["blocked"] else "")
        )
        return table
