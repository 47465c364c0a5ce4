"""What decides the bits of a result besides its science: set once per process, recorded in every manifest.

Equal numerics promise equal bits, on another machine too. `set_threads` must run before numpy or torch is imported.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jobs.node import machine
from orchestrator.catalog.kinds import computes
from orchestrator.errors import NumericsError
from orchestrator.spec.cell import THREADS, Execution, Resources

# How waiting threads wait: read once, when their library is loaded.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPINS = 2000
# In a process that jobs are forked from, the spin count that its libraries were loaded with; "" = its user's own.
_loaded: str | None = None

# Where the kernel counts for what its cores worked.
STAT = Path("/proc/stat")

# What a manifest of an earlier version means where it does not say it.
UNSAID = {"mesh": "", "tf32": False, "products": ""}


def set_threads(resources: Resources) -> None:
    """Fix the thread counts of every numeric library, and what else they read from the environment."""
    for name in THREADS:
        os.environ[name] = str(resources.cores)
    if resources.cores > 1 and os.environ.keys().isdisjoint(WAITING):
        _wait(spin_count(resources.cores, allowed_cores() - busy_threads()))
    # Equal code paths for equal inputs, whatever the alignment of a buffer and the generation of the CPU.
    machine.choose_branch(os.environ)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Page-aligned tensors that ask for huge pages: a step of a small model takes 2 % less time and 8 % more memory.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _wait(spins: int) -> None:
    os.environ.update(zip(WAITING, ("PASSIVE", str(spins)), strict=True))


def prepare_forks() -> None:
    """Fix the numerics of a process that jobs are forked from: one thread, and more of them wait as on idle cores."""
    global _loaded
    set_threads(Resources(cores=1))
    _loaded = ""
    if os.environ.keys().isdisjoint(WAITING):
        _wait(SPINS)
        _loaded = str(SPINS)


def may_fork() -> bool:
    """Return whether ranks may be forks of this process, which then was forked itself, with its libraries loaded.

    A fork takes one thread along: what waits for another one, as the client of a bucket does, would do so for ever.
    """
    return _loaded is not None and len(os.listdir("/proc/self/task")) == 1


def fits_fork(resources: Resources, kinds: Iterable[str]) -> bool:
    """Return whether a fork may do stages of these kinds with so many threads as a process of its own would.

    Threads wait as on idle cores there, and of the libraries torch alone can change how many it has.
    """
    if _loaded is None or resources.cores == 1:
        return True
    spins = _loaded and spin_count(resources.cores, allowed_cores() - busy_threads())
    return {*kinds} == {"train"} and str(spins) == _loaded


def leave_fork() -> None:
    """Make the environment that of a process of its own again."""
    for name in WAITING if _loaded else ():
        os.environ.pop(name, None)


def spin_count(cores: int, idle: float) -> int:
    """Return how often a waiting thread of `cores` looks again before it sleeps; no bit depends on it.

    Waking a sleeping thread costs tens of microseconds, several times in each layer: on idle cores a step of a small
    model takes 1.7 times as long without spinning. Where others want the cores it takes twice as long with it.
    """
    return SPINS if cores <= idle + 0.5 else 0


def allowed_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_threads(seconds: float = 0.1) -> float:
    """Return how many cores of the machine worked on average for that time, 0.0 where nobody tells.

    What gives way to others (`nice`), as the publisher to a tracker does, is not counted.
    """
    before = _worked()
    time.sleep(seconds)
    return max(_worked() - before, 0.0) / seconds


def _worked() -> float:
    """Return the seconds that the machine's cores have worked for all but what gives way: proc_stat(5)."""
    try:
        user, _, system = map(int, STAT.read_text().split(maxsplit=4)[1:4])
    except (OSError, ValueError):
        return 0.0
    return (user + system) / os.sysconf("SC_CLK_TCK")


def prepare_torch(execution: Execution, resources: Resources) -> None:
    """Import torch with fixed threads and, unless the site says otherwise, deterministic algorithms."""
    import torch

    torch.set_num_threads(resources.cores)
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)
    # use_deterministic_algorithms says it to torch's compiler too, and imports it for that: two seconds of a start.
    torch.set_deterministic_debug_mode("error" if execution.deterministic else "default")
    if execution.deterministic:
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    # Filling fresh memory costs a pass over every activation and changes no result of initialised code.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_products(execution)
    keep_freed_memory()


def keep_products(execution: Execution) -> None:
    """Let products of fp32 round to TF32 only where the grid says so, and sums of bf16 products stay in fp32.

    torch itself lets convolutions round to TF32, and cuBLAS add partial sums of bf16 products in bf16.
    """
    import torch

    torch.set_float32_matmul_precision("high" if execution.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = execution.tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def keep_freed_memory() -> None:
    """Let the C library reuse freed memory instead of giving it back: page faults cost 4 % of a training step.

    glibc only; elsewhere nothing happens. No bit depends on it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 32 << 20)  # the most that glibc allows
        mallopt(trim_threshold, 1 << 30)


def give_back_freed_memory() -> None:
    """Give the kernel what is free between blocks that stay: temporary ones of ever other sizes leave such holes.

    glibc only; elsewhere nothing happens. No bit depends on it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def of_stage(kind: str, execution: Execution, resources: Resources, world_size: int) -> dict[str, Any]:
    """Return the numerics of a stage: torch's own facts count for those alone that compute with it.

    Whether torch is loaded depends on what else a process was given to do, and says nothing of the others.
    """
    facts = _of_process(execution, resources, world_size)
    if kind != "train":
        facts["mesh"] = ""  # only training lays out its ranks
    return facts | _of_torch(execution) if computes(kind) else facts


def record(execution: Execution, resources: Resources, world_size: int) -> dict[str, Any]:
    """Return the numerics of this process; torch's own facts are added once torch is imported."""
    return _of_process(execution, resources, world_size) | _of_torch(execution)


def _of_process(execution: Execution, resources: Resources, world_size: int) -> dict[str, Any]:
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = ""
    return {
        "device": execution.device,
        "world_size": world_size,
        "threads": resources.cores,
        "torch": torch_version,
        "engine": execution.engine,
        "mesh": execution.parallel.name(world_size),
        "deterministic": execution.deterministic,
    }


def _of_torch(execution: Execution) -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device_name": torch.cuda.get_device_name() if execution.device == "cuda" else "",
        # As it is, whoever set it.
        "tf32": torch.get_float32_matmul_precision() != "highest",
        **machine.facts(execution.device),
    }


def differing(parent: Mapping[str, object], own: Mapping[str, object]) -> dict[str, tuple[Any, Any]]:
    """Return name -> (parent's, own) of the numerics that differ; what a manifest does not record is not compared."""
    parent = {**UNSAID, **parent}
    return {name: (parent[name], own[name]) for name in own if name in parent and parent[name] != own[name]}


def refuse_other(parent: Mapping[str, object], own: Mapping[str, object], what: str) -> None:
    """Raise NumericsError when a state made under `parent` would be continued under `own`."""
    found = differing(parent, own)
    if not found:
        return
    listed = ", ".join(f"{name} {_shown(was)} -> {_shown(now)}" for name, (was, now) in sorted(found.items()))
    variables = machine.variables_of(parent, machine.cpu_fields()) if "mkl_branch" in found else ""
    raise NumericsError(
        f"{what} would be continued under other numerics",
        cause=listed,
        hint="run with the resources, on the kind of CPU and with the variables that the state was made with"
        f"{f' ({variables})' * bool(variables)}, or accept other bits with --allow-numerics",
    )


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={text}" for name, text in sorted(value.items())) or "none"
    return str(value) if value != "" else "none"
