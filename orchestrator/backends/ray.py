"""Jobs on a Ray cluster: a placement group per job, and on each of its nodes a detached actor that runs the processes.

The actors carry the job's name and outlive the driver, so that any later driver finds, polls and stops them. An actor
starts the same plain command as every other site does. When an actor's node or worker dies, the job's processes get
SIGTERM and save their state.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import os
import secrets
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.backends.base import (
    DRIVER_KEYS,
    ELSEWHERE,
    ENDED,
    QUEUED,
    RUNNING,
    Batch,
    Handle,
    Job,
    JobState,
    SchedulerUnreachable,
    node_arguments,
)
from orchestrator.backends.processes import NodeJob, Processes, ending, free_place, patience
from orchestrator.catalog.backends import BACKENDS
from orchestrator.errors import MoegridError
from orchestrator.grid.site_fields import settings_of, variables
from orchestrator.resources import ROOT
from orchestrator.spec.cell import Resources
from orchestrator.store.attempts import batch_of

NAMESPACE = "moegrid"
LISTS = BACKENDS.get("ray").lists
# Seconds for an answer of an actor that is known to run, and of one that may still wait for its resources.
ANSWER_SECONDS, FIRST_ANSWER_SECONDS = 20.0, 0.5
LOG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RaySite:
    """What a site file (`infra/sites/ray.yaml`) says about a cluster; the comments there explain each field."""

    address: str = ""
    python: str = ""
    project: str = ""
    container: str = ""
    log_directory: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    pass_environment: tuple[str, ...] = ("AWS_*", "MOEGRID_*", "MLFLOW_*", "HF_*")
    custom_resources: Mapping[str, float] = field(default_factory=dict)
    max_jobs: int = field(default=256, metadata={"least": 1})

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> RaySite:
        """Build from plain settings; an empty value means the default. Raises GridError with what is wrong."""
        return settings_of(cls, settings, LISTS, DRIVER_KEYS)


class NodeActor:
    """The supervisor of one node's processes; it becomes a Ray actor. `leader` is the actor of the node with rank 0."""

    def __init__(self, job: NodeJob, leader: Any = None) -> None:
        import ray

        # By this address the cluster's nodes know each other; a host's name may mean another one.
        master = ray.get(leader.master.remote()) if leader is not None else free_place(ray.util.get_node_ip_address())
        self._processes = Processes(job, master)

    def master(self) -> tuple[str, int]:
        """Return where rank 0 listens."""
        return self._processes.master

    def state(self) -> dict[str, Any]:
        """Return how the node's processes are."""
        return self._processes.state()

    def stop(self, number: int) -> None:
        """Signal the node's processes."""
        self._processes.stop(number)

    def output(self, limit: int) -> bytes:
        """Return the end of their output."""
        return self._processes.output(limit)


class RayBackend:
    """One Ray cluster: the running one of this machine, that of an address, or one of this process alone."""

    name = "ray"

    def __init__(self, site: RaySite | None = None, *, program: Sequence[str] = ()) -> None:
        """`program` replaces `python -m jobs.run`."""
        self.site = site or RaySite()
        python = self.site.python or sys.executable
        self._program = tuple(program) or (*shlex.split(self.site.container), python, "-m", "jobs.run")
        self._actors: dict[str, list[Any]] = {}
        self._asked: dict[str, list[Any]] = {}
        self._seen: set[str] = set()
        self._first_end: dict[str, float] = {}
        self._groups: dict[str, object] = {}
        self._outputs: dict[str, Path | None] = {}  # of jobs that are over

    def admit(self, wanted: Sequence[Resources]) -> list[bool]:
        """Admit all up to `max_jobs`: Ray queues what does not fit, but each waiting job costs it something."""
        return [len(self._actors) + index < self.site.max_jobs for index in range(len(wanted))]

    def submit(self, batch: Batch) -> dict[str, Handle]:
        with self._cluster() as ray:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            actor = ray.remote(NodeActor)
            return {job.attempt: self._start(ray, actor, nodes, batch, job) for job in batch.jobs}

    def poll(self, handles: Sequence[Handle]) -> dict[str, JobState]:
        states = {handle.attempt: JobState(ELSEWHERE) for handle in handles}
        handles = [handle for handle in handles if _is_ray(handle)]
        if not handles:
            return states
        with self._cluster() as ray:
            for handle in handles:
                if handle.attempt not in self._asked:
                    self._asked[handle.attempt] = [actor.state.remote() for actor in self._find(ray, handle)]
            asked = {handle.attempt: self._asked[handle.attempt] for handle in handles}
            known = [ref for attempt, refs in asked.items() if attempt in self._seen for ref in refs]
            if known:
                ray.wait(known, num_returns=len(known), timeout=ANSWER_SECONDS)
            every = [ref for refs in asked.values() for ref in refs]
            ready = set(ray.wait(every, num_returns=len(every), timeout=FIRST_ANSWER_SECONDS)[0]) if every else set()
            for handle in handles:
                states[handle.attempt] = self._state(ray, handle, ready)
            over = [handle for handle in handles if states[handle.attempt].phase == ENDED]
            self._fetch_outputs(ray, [handle for handle in over if handle.attempt not in self._outputs])
        return states

    def find(self, batch: str) -> dict[str, Handle]:
        return {attempt: handle for attempt, handle in self.held().items() if handle.batch == batch}

    def held(self) -> dict[str, Handle]:
        """Return all jobs that have actors, which hold their resources until they are forgotten."""
        with self._cluster() as ray:
            named = ray.util.list_named_actors(all_namespaces=True)
        counts: dict[str, int] = {}
        for name in (entry["name"] for entry in named if entry["namespace"] == NAMESPACE):
            attempt, _, node = name.partition("/")
            if node:
                counts[attempt] = counts.get(attempt, 0) + 1
        return {attempt: _handle(attempt, batch_of(attempt), nodes) for attempt, nodes in counts.items()}

    def cancel(self, handles: Sequence[Handle], *, now: bool) -> None:
        handles = [handle for handle in handles if _is_ray(handle)]
        if not handles:
            return
        states = self.poll(handles)
        with self._cluster() as ray:
            for handle in handles:
                if states[handle.attempt].phase == QUEUED:
                    self._remove(ray, handle)
                elif states[handle.attempt].phase == RUNNING:
                    number = signal.SIGKILL if now else signal.SIGTERM
                    for actor in self._find(ray, handle):
                        actor.stop.remote(int(number))

    def forget(self, handles: Sequence[Handle]) -> None:
        """End the actors of jobs that are over: until then they hold their resources and what they know."""
        handles = [handle for handle in handles if _is_ray(handle)]
        if handles:
            with self._cluster() as ray:
                for handle in handles:
                    self._remove(ray, handle)

    def log(self, handle: Handle) -> Path | None:
        """Return a local file with the end of the job's output, None when its nodes are gone.

        That of a job that `poll` saw end was fetched then, with those of all others; one that runs is asked now.
        """
        if not _is_ray(handle):
            return None
        if handle.attempt in self._outputs:
            return self._outputs[handle.attempt]
        with contextlib.suppress(SchedulerUnreachable), self._cluster() as ray:
            self._fetch_outputs(ray, [handle])
        return self._outputs.pop(handle.attempt, None)  # there may be more the next time

    def check(self) -> str:
        """Return in words what the cluster has."""
        with self._cluster() as ray:
            total, nodes = ray.cluster_resources(), [node for node in ray.nodes() if node["Alive"]]
        return f"{len(nodes)} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[Any]:
        """Yield ray, connected. Raises SchedulerUnreachable when the cluster is away."""
        address = self.site.address or os.environ.get("RAY_ADDRESS") or ("auto" if _runs_here() else "local")
        if address == "local" and "ray" not in sys.modules:
            # Ray listens on every interface: a cluster of our own takes nobody without its token. Ray reads this once.
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        try:
            import ray
        except ImportError as error:
            raise MoegridError(
                "site ray needs the package ray", cause=str(error), hint="make setup SITE=ray"
            ) from error
        try:
            if not ray.is_initialized():
                _connect(ray, address)
            yield ray
        except (ray.exceptions.RayError, ConnectionError, TimeoutError, RuntimeError) as error:
            raise SchedulerUnreachable(
                "the Ray cluster does not answer",
                cause=" ".join(str(error).split())[:500],
                hint="check it with `ray status`; its jobs go on while it lives, and moegrid resume finds them",
            ) from error

    def _start(self, ray: Any, actor: Any, nodes: Sequence[Mapping[str, float]], batch: Batch, job: Job) -> Handle:
        resources, handle = job.resources, _handle(job.attempt, batch.name, job.resources.nodes)
        bundle = self._bundle(nodes, resources)
        group = ray.util.placement_group(
            [bundle] * resources.nodes, strategy="SPREAD", name=job.attempt, lifetime="detached"
        )
        command = (*self._program, *node_arguments(batch, job))
        passed = {
            name: value
            for name, value in os.environ.items()
            if any(fnmatch.fnmatch(name, pattern) for pattern in self.site.pass_environment)
        }
        self._groups[job.attempt] = group
        actors: list[object] = []
        for node in range(resources.nodes):
            request = NodeJob(
                attempt=job.attempt,
                command=command,
                processes=resources.processes,
                first=node * resources.processes,
                world=resources.nodes * resources.processes,
                cores=resources.cores,
                gpus=resources.gpus,
                environment={**passed, **variables(self.site.environment), **batch.environment},
                project=self.site.project or str(ROOT),
                log_directory=self.site.log_directory,
            )
            strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=node
            )
            options = {
                "name": f"{job.attempt}/{node}",
                "namespace": NAMESPACE,
                "lifetime": "detached",
                "num_cpus": bundle["CPU"],
                "num_gpus": bundle.get("GPU", 0),
                "memory": bundle["memory"],
                "resources": dict(self.site.custom_resources) or None,
                "scheduling_strategy": strategy,
            }
            actors.append(actor.options(**options).remote(request, actors[0] if actors else None))
        self._actors[job.attempt] = actors
        return handle

    def _bundle(self, nodes: Sequence[Mapping[str, float]], resources: Resources) -> dict[str, float]:
        """Return what a node of the job asks for; what none of `nodes` could is cut, so that the job runs alone."""
        share = max(1.0, resources.nodes / max(1, len(nodes)))
        cores = max((node.get("CPU", 0.0) for node in nodes), default=1.0) / share
        memory = max((node.get("memory", 0.0) for node in nodes), default=2.0**30) / share
        bundle = {
            "CPU": min(float(resources.cores * resources.processes), cores),
            "memory": float(int(min(resources.memory_gb * 2**30, memory))),
        }
        if resources.gpus:
            bundle["GPU"] = float(resources.gpus)
        return bundle | dict(self.site.custom_resources)

    def _find(self, ray: Any, handle: Handle) -> list[Any]:
        """Return the actors of a job that still exist."""
        if handle.attempt not in self._actors:
            found = []
            for node in range(handle.details["nodes"]):
                with contextlib.suppress(ValueError):
                    found.append(ray.get_actor(f"{handle.attempt}/{node}", namespace=NAMESPACE))
            self._actors[handle.attempt] = found
        return self._actors[handle.attempt]

    def _state(self, ray: Any, handle: Handle, ready: set[Any]) -> JobState:
        attempt, refs = handle.attempt, self._asked[handle.attempt]
        if len(refs) < handle.details["nodes"]:
            del self._asked[attempt], self._actors[attempt]
            return JobState(ENDED)  # nobody knows how
        if any(ref not in ready for ref in refs):
            # Ray starts all actors of a placement group or none: one that does not answer is slow or waits.
            return JobState(RUNNING if attempt in self._seen else QUEUED)
        del self._asked[attempt]
        try:
            answers = [ray.get(ref) for ref in refs]
        except ray.exceptions.ActorUnavailableError:
            return JobState(RUNNING)
        except ray.exceptions.RayActorError:
            # The node or the worker is gone. What is left of the job on other nodes waits in vain for its ranks.
            for actor in self._actors[attempt]:
                actor.stop.remote(int(signal.SIGTERM))
            return JobState(ENDED, reason="NODE_FAIL")
        self._seen.add(attempt)
        codes = [code for answer in answers for code in answer["codes"]]
        host, rss = answers[0]["host"], max(answer["rss"] for answer in answers)
        if None in codes:
            if any(code is not None for code in codes):
                since = self._first_end.setdefault(attempt, time.monotonic())
                if time.monotonic() - since > patience(codes):
                    for actor in self._actors[attempt]:
                        actor.stop.remote(int(signal.SIGKILL))
            return JobState(RUNNING, host=host)
        code = ending(codes)
        reason = "OUT_OF_MEMORY" if any(answer["oom"] for answer in answers) else ""
        return JobState(ENDED, code if code >= 0 else None, max(0, -code), reason, host, rss)

    def _fetch_outputs(self, ray: Any, handles: Sequence[Handle]) -> None:
        """Write the ends of jobs' outputs to local files; all of their nodes are asked at once."""
        asked = {handle.attempt: [a.output.remote(LOG_BYTES) for a in self._find(ray, handle)] for handle in handles}
        every = [ref for refs in asked.values() for ref in refs]
        ready = set(ray.wait(every, num_returns=len(every), timeout=ANSWER_SECONDS)[0]) if every else set()
        folder = Path(tempfile.gettempdir()) / f"moegrid-{os.getuid()}" / "ray"
        for attempt, refs in asked.items():
            parts = []
            for ref in refs:
                with contextlib.suppress(ray.exceptions.RayError):
                    parts += [ray.get(ref)] if ref in ready else []
            self._outputs[attempt] = folder / f"{attempt}.log" if parts else None
            if parts:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{attempt}.log").write_bytes(b"".join(parts))

    def _remove(self, ray: Any, handle: Handle) -> None:
        for actor in self._find(ray, handle):
            ray.kill(actor)
        with contextlib.suppress(ValueError):
            group = self._groups.get(handle.attempt) or ray.util.get_placement_group(handle.attempt)
            ray.util.remove_placement_group(group)
        for known in (self._actors, self._asked, self._first_end, self._groups, self._outputs):
            known.pop(handle.attempt, None)
        self._seen.discard(handle.attempt)


def _handle(attempt: str, batch: str, nodes: int) -> Handle:
    return Handle(attempt, batch, attempt, {"ray": NAMESPACE, "nodes": nodes})


def _runs_here() -> bool:
    """Did somebody start a Ray cluster on this machine (and not end it)?"""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray/ray_current_cluster").exists()


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address.startswith("ray://") and importlib.util.find_spec("grpc") is None:
        raise MoegridError(
            f"cannot connect to {address} from outside the cluster",
            cause="Ray's client needs the package grpcio, here and on the head node",
            hint="pip install 'ray[client]', or name host:port and run moegrid on a machine of the cluster",
        )
    common = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, **common)
        else:
            ray.init(address=address, **common)
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)  # ray takes it, but it is the driver's


def _is_ray(handle: Handle) -> bool:
    """Is this one of our handles, or that of a cell which was begun at another site?"""
    return "ray" in handle.details


def open_site(settings: RaySite, store: str) -> RayBackend:
    """Return the backend of a site."""
    return RayBackend(settings)
