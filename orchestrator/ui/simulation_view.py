"""A simulation as people read it: one line a shape, what does not fit with what would make it fit, what is assumed."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.catalog.gpus import Gpu
from orchestrator.grid.load import Grid
from orchestrator.plan.memory import Memory
from orchestrator.plan.roofline import assumptions
from orchestrator.plan.simulation import Simulation
from orchestrator.ui.console import Console, columns, plural, quantity


def show_simulation(grid: Grid, found: Sequence[Simulation], gpu: Gpu, console: Console) -> None:
    """Print what was found."""
    console.tell(
        f"{console.style(grid.name, 'bold')} at scale {grid.scale} on {gpu.name}: {plural(len(found), 'shape')}"
    )
    rows = [["", "shape", "engine", "ranks", "stages", "moment", "device GB", "of", "host GB", "of", "a step", "sent"]]
    for one in found:
        fit, shape = one.fit, one.shape
        resources = shape.resources
        mark = console.style("=", "green") if fit.fits else console.style("!", "red")
        on_device = shape.device != "cpu"
        seconds = f"{one.time.seconds:.2f} s" if on_device and one.time.seconds else ""
        rows.append(
            [
                mark,
                f"{shape.label} ({quantity(one.answer.parameters)})",
                shape.engine,
                f"{resources.nodes}x{resources.processes}",
                str(sum(shape.stages.values())),
                fit.moment,
                f"{fit.device / 1e9:.1f}" if on_device else "",
                f"{fit.device_limit / 1e9:.1f}" if on_device else "",
                f"{fit.host / 1e9:.1f}",
                f"{fit.host_limit / 1e9:.1f}",
                seconds,
                f"{one.time.sent / 1e9:.2f} GB" if one.time.sent else "",
            ]
        )
    for line in columns(rows, right=(3, 4, 6, 7, 8, 9, 10, 11), width=max(0, console.width - 2)):
        console.print("  " + line)
    for one in found:
        for name, held in one.answer.moments.items():
            kinds = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in held.kinds.items() if size >= 50_000_000)
            console.tell(f"  {one.shape.label}, {name}: {held.bytes / 1e9:.1f} GB{kinds and f' ({kinds})'}")
    for one in found:
        _show_lack(one, gpu, console)
    hours = sum(one.gpu_hours for one in found)
    if hours:
        console.tell(f"  about {hours:.1f} GPU-hours for the whole grid (a roofline, of what is assumed below)")
    for text in assumptions(gpu):
        console.tell(console.style(f"  assumed: {text}", "dim"))


def show_memory(memory: Sequence[Memory], gpu: Gpu, console: Console) -> None:
    """Print what is known of the GPUs' memory in a plan."""
    for one in memory:
        fits = one.fits(gpu)
        mark = "" if fits else console.style("! ", "red")
        how = "" if one.simulated else "at least "
        told = "simulated" if one.simulated else "without activations; moegrid simulate says the rest"
        lack = "" if fits else f", more than {gpu.name} has"
        console.tell(f"  {mark}{one.label}: {how}{one.bytes / 1e9:.1f} GB a GPU{lack} ({told})")


def _show_lack(one: Simulation, gpu: Gpu, console: Console) -> None:
    """Say what of a shape does not fit."""
    fit, label = one.fit, one.shape.label
    mark = console.style("!", "red")
    if one.answer.failed:
        console.tell(f"  {mark} {label} was not simulated: {one.answer.failed}")
        return
    if fit.short:
        console.tell(f"  {mark} {label} lacks {fit.short / 1e9:.1f} GB of {gpu.name} at the moment {fit.moment!r}")
    if fit.host_short:
        console.tell(f"  {mark} {label} lacks {fit.host_short / 1e9:.1f} GB of its node's memory")
    if one.change:
        console.print(f"      it fits with {' '.join(one.change)}")
    elif fit.short:
        other = f"; {one.larger} would hold it" if one.larger else ""
        console.tell(f"      no change of engine or number of GPUs that was tried makes it fit{other}")
