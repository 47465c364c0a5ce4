"""`moegrid gc`, `doctor`, `schema`: keeping the store small, and finding out why something does not work."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.catalog.trackers import MLFLOW, TRACKERS, tracker_of
from orchestrator.commands.context import Context
from orchestrator.errors import EXIT_DONE, EXIT_UNREACHABLE, MoegridError
from orchestrator.settings import load_site, open_backend, store_url, tracking_uri
from orchestrator.store import Store
from orchestrator.store.opening import open_objects
from orchestrator.ui.console import Console, duration

DAY = 86400.0
LEAST_FREE_GB = 5.0
MOST_SKEW_SECONDS = 5.0
PINNED = ("torch", "transformers", "lm-eval", "mlflow", "omegaconf", "obstore")


def gc(context: Context) -> int:
    """Show what no grid needs, or delete it."""
    from orchestrator.store.retention import collect, grid_roots, plan_gc

    arguments, console = context.arguments, context.console
    plan = plan_gc(context.store, grid_roots(context.store), arguments.grace * DAY)
    if arguments.json and not arguments.delete:
        context.emit(plan.to_json())
        return EXIT_DONE
    console.print(f"{len(plan.keep)} artifacts are needed by a grid that was run in this store")
    console.print(f"{len(plan.mark)} are not and would be marked; {len(plan.delete)} were marked long enough ago")
    console.print(f"{len(plan.strays)} stray objects; {plan.delete_bytes / 2**20:.1f} MiB can be freed now")
    if not arguments.delete:
        console.tell(
            f"nothing was changed; moegrid gc --delete marks, and deletes {duration(plan.grace_seconds)} after marking"
        )
        return EXIT_DONE
    done = collect(context.store, plan)
    if arguments.json:
        context.emit({"deleted": list(done.deleted), "spared": list(done.spared), "bytes": done.bytes})
    console.print(f"marked {len(plan.mark)}, deleted {len(done.deleted)} artifacts, freed {done.bytes / 2**20:.1f} MiB")
    return EXIT_DONE


def schema(arguments: argparse.Namespace) -> int:
    """Write the JSON Schema of grid files, for editors."""
    from orchestrator.grid.schema import grid_schema

    json.dump(grid_schema(), sys.stdout, indent=2)
    sys.stdout.write("\n")
    return EXIT_DONE


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: what was found, and the remedy when it is wrong."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def doctor(arguments: argparse.Namespace) -> int:
    """Check everything a run needs; exit code 3 when something is wrong."""
    console = Console(sys.stdout)
    checks: list[Check] = []
    for look in (_python, _packages, _plugins, _store, _disk, _tracker, _site, _fetched):
        try:
            checks.extend(look(arguments))
        except MoegridError as error:
            checks.append(
                Check(look.__name__.strip("_"), False, ": ".join(filter(None, (error.error, error.cause))), error.hint)
            )
    if arguments.json:
        json.dump([asdict(check) for check in checks], sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        for check in checks:
            mark = console.style("ok  ", "green") if check.ok else console.style("FAIL", "red")
            console.tell(f"{mark} {check.name}: {check.found}")
            if not check.ok and check.remedy:
                console.tell(f"     hint: {check.remedy}")
    return EXIT_DONE if all(check.ok for check in checks) else EXIT_UNREACHABLE


def _python(arguments: argparse.Namespace) -> Iterator[Check]:
    version = sys.version_info[:2]
    yield Check("python", (3, 11) <= version <= (3, 13), sys.version.split()[0], "use Python 3.11, 3.12 or 3.13")


def _packages(arguments: argparse.Namespace) -> Iterator[Check]:
    pins = _constraints()
    for name in PINNED:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, False, "not installed", "make setup")
            continue
        wanted = pins.get(name, installed)
        same = installed.split("+")[0] == wanted
        found = installed if same else f"{installed}, pinned is {wanted}"
        yield Check(name, same, found, f"pip install -c constraints.txt {name}=={wanted}")


def _plugins(arguments: argparse.Namespace) -> Iterator[Check]:
    from orchestrator.commands.installed import packages

    for package in packages():
        yield Check(f"plugin {package.name}", bool(package.names) or not package.broken, str(package))
        for found, remedy in package.broken:
            yield Check(f"plugin {package.name}", False, found, remedy)


def _constraints() -> dict[str, str]:
    from orchestrator.resources import ROOT

    path = ROOT / "constraints.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.split("==") for line in lines if line.count("==") == 1)
    return {name.strip().lower().replace("_", "-"): version.strip() for name, version in pairs}


def _store(arguments: argparse.Namespace) -> Iterator[Check]:
    url = store_url(arguments.store)
    exists = Store.peek(url, patience=5.0).exists
    if not exists and ("://" not in url or url.startswith("file://")):
        folder = _nearest(Path(url.removeprefix("file://")))
        writable = folder.is_dir() and os.access(folder, os.W_OK)
        found = f"there is none at {url} yet: a run makes it" + ("" if writable else f", but cannot write in {folder}")
        remedy = f"make {folder} writable, or choose another folder with STORE= or --store"
        yield Check("store", writable, found, remedy)
        return
    began = time.monotonic()
    objects = open_objects(url, patience=5.0)
    objects.create("doctor.json", b"{}")
    objects.delete("doctor.json")
    took = time.monotonic() - began
    yield Check("store", True, f"{url} can be written ({took * 1000:.0f} ms)" + ("" if exists else "; a run makes it"))
    skew = abs(time.time() - objects.now())
    if not exists:
        objects.delete("clock")
    yield Check(
        "clock",
        skew < MOST_SKEW_SECONDS,
        f"{skew:.1f} s between this machine's clock and the store's",
        "leases do not depend on it, but times in tables do: start an NTP service",
    )


def _disk(arguments: argparse.Namespace) -> Iterator[Check]:
    places = {"scratch": Path(os.environ.get("TMPDIR", "/tmp")), "cache": _cache()}
    url = store_url(arguments.store)
    if "://" not in url:
        places["store"] = Path(url)
    for name, path in places.items():
        existing = _nearest(path)
        free = shutil.disk_usage(existing).free / 2**30
        writable = os.access(existing, os.W_OK)
        found = f"{free:.0f} GiB free in {path}" + ("" if writable else ", not writable")
        remedy = "moegrid gc frees what no grid needs; TMPDIR, MOEGRID_CACHE and MOEGRID_STORE name other places"
        yield Check(f"disk ({name})", free >= LEAST_FREE_GB and writable, found, remedy)


def _tracker(arguments: argparse.Namespace) -> Iterator[Check]:
    uri = tracking_uri(arguments.tracking, store_url(arguments.store))
    if not uri:
        yield Check("tracker", True, "turned off")
        return
    kind = tracker_of(uri).name
    if kind != MLFLOW:
        yield Check("tracker", True, f"{uri} ({TRACKERS.who(kind)})")
        return
    if uri.startswith(("http://", "https://")):
        import urllib.request

        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5) as answer:
                yield Check("tracker", answer.status == 200, f"{uri} answers")
        except OSError as error:
            remedy = (
                "start it, or name another with MLFLOW_TRACKING_URI; runs go on without, moegrid sync fills it later"
            )
            yield Check("tracker", False, f"{uri}: {error}", remedy)
        return
    path = Path(uri.removeprefix("sqlite:///"))
    existing = _nearest(path)
    yield Check("tracker", os.access(existing, os.W_OK), uri, f"make {existing} writable, or set MLFLOW_TRACKING_URI")


def _site(arguments: argparse.Namespace) -> Iterator[Check]:
    backend = open_backend(load_site(arguments.site))
    check: Callable[[], str] | None = getattr(backend, "check", None)
    if check is not None:
        yield Check(f"site {arguments.site}", True, check())
        return
    budget = getattr(backend, "budget", None)
    found = f"{budget.cores} cores, {budget.memory_gb:.1f} GiB, {budget.gpus} GPUs" if budget else "reachable"
    yield Check(f"site {arguments.site}", True, found)


def _fetched(arguments: argparse.Namespace) -> Iterator[Check]:
    from orchestrator.catalog.pins import PACKAGES

    for (scheme, name), package in PACKAGES.items():
        version = package.version.replace(":", "_")
        folder = _cache() / {"wheel": "wheels"}.get(scheme, scheme)
        files = [*folder.glob(f"{name}-{version}*"), *folder.glob(f"{name}_*.deb")]
        there = next((file for file in files if file.suffix in (".whl", ".tgz", ".deb")), None)
        fetch = "not fetched yet, a run that needs it fetches it"
        found = f"{package.version} in {there.parent}" if there else f"{package.version} {fetch}"
        yield Check(f"{scheme} {name}", True, found)


def _nearest(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    return next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))


def _cache() -> Path:
    return Path(os.environ.get("MOEGRID_CACHE") or Path.home() / ".cache" / "moegrid")
