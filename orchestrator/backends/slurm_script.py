"""From a batch and a site file to the text that sbatch gets: a plain command per array task, written by submitit."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.backends.base import DRIVER_KEYS, Batch
from orchestrator.catalog.backends import BACKENDS
from orchestrator.errors import MoegridError
from orchestrator.grid.site_fields import asked, settings_of, variables
from orchestrator.resources import ROOT
from orchestrator.spec.cell import HUGE_PAGES, THREADS, Resources

# Seconds that the other ranks of a job get after the first one has ended: they may still be saving.
RANK_PATIENCE = 300
# Where the master listens: below the ephemeral ports, so that no outgoing connection can hold it.
_FIRST_PORT, _PORTS = 20000, 12000

_SINGLE = 'exec {command} --job "$job"'
# The node's address is asked for, because a node's name need not resolve; the port follows from the job id, so that
# jobs that share a node do not meet. Each rank takes its place from its own step's environment.
_MULTIPLE = r"""
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
export MASTER_ADDR=${{MASTER_ADDR:-$node}} MASTER_PORT=$(({port} + SLURM_JOB_ID % {ports}))
rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'
srun --unbuffered {arguments} /bin/sh -c "$rank" rank {command} --job "$job"
status=$?
# Accounting takes 128 off exit codes: what a signal ended ends by that signal here too, unless it only stops or wakes.
case $status in
    145|146|147|148|149|150|151|156) exit 1 ;;
    129|1[3-5][0-9]) ulimit -c 0; {{ sleep 0.2; kill -$((status - 128)) $$; }} & exec sleep 10 ;;
esac
[ $status -lt 128 ] || exit 1
exit $status
""".strip()

SUBMITIT_LOGGING = "SUBMITIT_LOG_LEVEL"


# Options of sbatch by which jobs are submitted and found again.
OWN_OPTIONS = frozenset({"array", "job-name", "parsable", "test-only", "wrap"})
LISTS = BACKENDS.get("slurm").lists


@dataclass(frozen=True, slots=True)
class SlurmSite:
    """What a site file (`infra/sites/slurm.yaml`) says about a cluster; the comments there explain each field."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    gpu_type: str = ""
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    project: str = ""
    container: str = ""
    scratch: str = ""
    proxy: str = ""
    log_directory: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, metadata={"own": OWN_OPTIONS})
    srun_options: tuple[str, ...] = ()
    requeue: bool = True
    signal_seconds: int = field(default=120, metadata={"least": 0})
    max_jobs: int = field(default=0, metadata={"least": 0})
    max_array: int = field(default=1000, metadata={"least": 1})
    array_parallelism: int = field(default=0, metadata={"least": 0})
    command_timeout: float = field(default=30.0, metadata={"least": 0.1})

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> SlurmSite:
        """Build from plain settings; an empty value means the default. Raises GridError with what is wrong."""
        return settings_of(cls, settings, LISTS, DRIVER_KEYS)


def load_submitit() -> Any:
    """Import submitit; raises MoegridError with the remedy when it is not installed.

    By itself its import sets up the logging of the whole process anew (submitit 1.5.4), which closes every handler that
    is there, and with some (absl's) the stream that they write to. It is told not to.
    """
    before = os.environ.get(SUBMITIT_LOGGING)
    os.environ[SUBMITIT_LOGGING] = "NOCONFIG"
    try:
        import submitit
    except ImportError as error:
        raise MoegridError(
            "site slurm needs the package submitit",
            cause=str(error),
            hint="make setup SITE=slurm, or: pip install 'moegrid[slurm]'",
        ) from error
    finally:
        if before is None:
            del os.environ[SUBMITIT_LOGGING]
        else:
            os.environ[SUBMITIT_LOGGING] = before
    return submitit


def array_name(name: str, chunk: int) -> str:
    """Return how array number `chunk` of a batch is called."""
    return f"{name}+{chunk}" if chunk else name


def log_path(logs: Path, batch: str, chunk: int, task: int | str) -> str:
    """Return the file with the output of one array task (`%a` for what SLURM fills in)."""
    return f"{logs}/{batch}/{array_name('job', chunk)}-{task}.log"


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as SLURM writes them: `0-4,7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def script(
    site: SlurmSite,
    batch: Batch,
    resources: Resources,
    chunk: int,
    tasks: Sequence[int],
    program: Sequence[str],
    logs: Path,
) -> str:
    """Return the submission file of one array. `cores` is per process; `gpus` and `memory_gb` are per node.

    The stop signal goes to the process itself: the batch step's where there is one process, else each rank's.
    """
    single = resources.nodes * resources.processes == 1
    seconds = min(site.signal_seconds, resources.minutes * 15)
    parallel = f"%{site.array_parallelism}" if site.array_parallelism else ""
    forced = {
        "array": ranges(tasks) + parallel,
        "output": log_path(logs, batch.name, chunk, "%a"),
        "chdir": str(logs / batch.name),
        "signal": f"{'B:' if single else ''}USR2@{seconds}",
        "requeue" if site.requeue else "no-requeue": True,
    }
    arguments = [f"--wait={RANK_PATIENCE}", f"--cpus-per-task={resources.cores}", *site.srun_options]
    command = (_SINGLE if single else _MULTIPLE).format(
        command=shlex.join([*program, "--store", batch.store, "--batch", batch.name]),
        arguments=shlex.join(arguments),
        port=_FIRST_PORT,
        ports=_PORTS,
    )
    gpus = f"{site.gpu_type}:{resources.gpus}" if site.gpu_type else resources.gpus
    text = load_submitit().slurm.slurm._make_sbatch_string(
        command=command,
        folder=str(logs),
        job_name=array_name(batch.name, chunk),
        partition=site.partition or None,
        account=site.account or None,
        qos=site.qos or None,
        constraint=site.constraint or None,
        exclude=site.exclude or None,
        time=resources.minutes,
        nodes=resources.nodes,
        ntasks_per_node=resources.processes,
        cpus_per_task=resources.cores,
        gpus_per_node=gpus if resources.gpus else None,
        mem=f"{math.ceil(resources.memory_gb * 1024)}M",
        wckey=None,
        stderr_to_stdout=True,
        use_srun=False,
        setup=[*_setup(site, resources), f"job=$((SLURM_ARRAY_TASK_ID + {chunk * site.max_array}))"],
        additional_parameters={**forced, **_options(site)},
    )
    return str(text)


def _options(site: SlurmSite) -> dict[str, Any]:
    """Return the site's further sbatch options as submitit calls its own, so that they replace those."""
    names = {name: name.lstrip("-").replace("-", "_") for name in site.options}
    given = {names[name]: value for name, value in asked(site.options).items()}
    return {"open-mode" if name == "open_mode" else name: value for name, value in given.items()}


def _setup(site: SlurmSite, resources: Resources) -> list[str]:
    """Return the shell lines that prepare the environment of the command."""
    lines = [f"module load {shlex.quote(module)}" for module in site.modules]
    if site.proxy:
        lines += [f"export {name}={shlex.quote(site.proxy)}" for name in ("http_proxy", "https_proxy")]
    if site.scratch:  # in double quotes: it may name variables of the job, such as $SLURM_JOB_ID
        lines += [f'export TMPDIR="{site.scratch}"', 'mkdir -p "$TMPDIR"']
    lines += [f"export {name}={resources.cores}" for name in THREADS]
    name, tunables = HUGE_PAGES
    lines.append(f"export {name}=${{{name}:-{tunables}}}")
    path = shlex.quote(site.project or str(ROOT)) + "${PYTHONPATH:+:$PYTHONPATH}"
    lines += ["export PYTHONUNBUFFERED=1", "export PYTHONSAFEPATH=1", f"export PYTHONPATH={path}"]
    if not resources.gpus:
        lines.append("export CUDA_VISIBLE_DEVICES=")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables(site.environment).items()]
    return [*lines, *site.setup]
