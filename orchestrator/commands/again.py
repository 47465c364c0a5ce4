"""The command line that means the same grid, store and tracker again, for a shell in the same working directory."""

from __future__ import annotations

import argparse
import os
import shlex
from urllib.parse import urlsplit

from orchestrator.settings import NO_TRACKER, store_url, tracking_uri

# Options of a run that its continuation needs too; how failures are tried again is asked for anew each time.
_DRIVING = (("max_jobs", "--max-jobs"), ("max_gpu_hours", "--max-gpu-hours"), ("max_core_hours", "--max-core-hours"))
_SWITCHES = (("allow_numerics", "--allow-numerics"), ("no_report", "--no-report"), ("force_memory", "--force-memory"))


def command(arguments: argparse.Namespace, name: str) -> str:
    """Return `moegrid NAME GRID ...` as one types it."""
    driving = _driving_words(arguments) if name in ("run", "resume", "tick") else []
    return shlex.join(["moegrid", name, *grid_words(arguments), *driving, *place_words(arguments)])


def grid_words(arguments: argparse.Namespace) -> list[str]:
    """Return the arguments that mean this grid."""
    words = [arguments.grid, *arguments.written]
    if arguments.scale != "tiny":
        words += ["--scale", arguments.scale]
    if arguments.site != "local":
        words += ["--site", arguments.site]
    if arguments.seeds is not None:
        words += ["--seeds", ",".join(map(str, arguments.seeds))]
    if arguments.no_share:
        words.append("--no-share")
    for name in ("nodes", "processes"):
        if getattr(arguments, name):
            words += [f"--{name}", str(getattr(arguments, name))]
    for only in arguments.only:
        words += ["--only", only]
    return words


def place_words(arguments: argparse.Namespace) -> list[str]:
    """Return the arguments that mean this store and tracker; what the defaults mean, or holds a secret, is left out."""
    words = []
    url = store_url(arguments.store)
    if url != store_url("runs"):
        words += ["--store", arguments.store or os.environ.get("MOEGRID_STORE") or url]
    uri = tracking_uri(arguments.tracking, url)
    named = arguments.tracking or os.environ.get("MOEGRID_TRACKING") or os.environ.get("MLFLOW_TRACKING_URI")
    if named and (arguments.tracking or "@" not in urlsplit(uri).netloc):
        words += ["--tracking", uri or NO_TRACKER]
    return words


def _driving_words(arguments: argparse.Namespace) -> list[str]:
    words = ["--gpu", arguments.gpu] if getattr(arguments, "gpu", "") else []
    for name, option in _DRIVING:
        value = getattr(arguments, name, None)
        if value:
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return words + [option for name, option in _SWITCHES if getattr(arguments, name, False)]
