"""`moegrid simulate`: what every shape of a grid would hold and take on a GPU, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

from orchestrator.backends.host import cores
from orchestrator.catalog.engines import ENGINES
from orchestrator.catalog.gpus import DEFAULT, gpu_of
from orchestrator.commands.context import Context
from orchestrator.engine.journal import Journal
from orchestrator.errors import EXIT_DONE, EXIT_FAILED, MoegridError
from orchestrator.plan.answers import Answer, keep_answer, known_answer, read_answer
from orchestrator.plan.shapes import Shape, shapes_of
from orchestrator.plan.simulation import Simulation, simulation_of
from orchestrator.settings import module_environment, require

# Processes that answer side by side: half a gigabyte each.
MOST = 4
Ask = Callable[[Shape], Answer]
S = TypeVar("S")
R = TypeVar("R")


class Nodes:
    """The data plane's answers: those that are kept, else from one process that is started at the first question."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, shape: Shape) -> Answer:
        """Return the answer to one question."""
        known = known_answer(shape.question)
        if known is not None:
            return known
        if self._process is None:
            require("torch", "moegrid simulate runs training steps without values")
            command = [sys.executable, "-m", "jobs.simulate.run"]
            # The control plane never imports torch.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=module_environment()
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(shape.question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise MoegridError(
                f"the simulation of {shape.label} ended without an answer (exit code {self._process.wait()})",
                hint="its own message stands above; a kill without one is the machine's memory at its end",
            )
        if shape.engine and not ENGINES.get(shape.engine).tidy:
            self.close()  # the next shape has a process of its own
        document = json.loads(line)
        if "failed" not in document:
            keep_answer(shape.question, document)
        return read_answer(document)

    def kill(self) -> None:
        """End the process at once, whatever it was asked."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
        self._process = None


def simulate(context: Context) -> int:
    """Simulate every shape of the grid; exit code 1 when something does not fit."""
    from orchestrator.ui.simulation_view import show_simulation

    gpu = gpu_of(context.arguments.gpu or DEFAULT)
    graph = context.load_graph()
    plan, shapes = context.plan(graph, Journal(context.store)), shapes_of(graph)
    found = side_by_side(lambda shape, ask: simulation_of(plan, shape, gpu, ask), shapes, _told(shapes))
    if context.arguments.json:
        context.emit({"grid": graph.grid.name, "scale": graph.grid.scale, **Simulation.to_json(found, gpu)})
    else:
        show_simulation(graph.grid, found, gpu, context.console)
    return EXIT_DONE if all(one.fit.fits for one in found) else EXIT_FAILED


def side_by_side(simulated: Callable[[S, Ask], R], shapes: Sequence[S], unknown: int) -> list[R]:
    """Return the simulation of every shape in order; each core answers one at a time, MOST at once."""
    free: SimpleQueue[Nodes] = SimpleQueue()
    nodes = [Nodes() for _ in range(max(1, min(cores(), MOST, unknown)))]
    for one in nodes:
        free.put(one)

    def run(shape: S) -> R:
        own = free.get()
        try:
            return simulated(shape, own.ask)
        finally:
            free.put(own)

    pool = ThreadPoolExecutor(len(nodes))
    try:
        return list(pool.map(run, shapes))
    except BaseException:  # after a fault, or Ctrl-C, nothing more is begun
        pool.shutdown(wait=False, cancel_futures=True)
        for one in nodes:
            one.kill()
        raise
    finally:
        pool.shutdown()
        for one in nodes:
            one.close()


def _told(shapes: Sequence[Shape]) -> int:
    """Say how much there is to do, and return it: a shape takes seconds, or a minute."""
    new = sum(known_answer(shape.question) is None for shape in shapes)
    if new:
        print(f"simulating {new} of {len(shapes)} shapes", file=sys.stderr)
    return new
