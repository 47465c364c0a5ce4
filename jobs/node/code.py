"""The digest of the code that trains: a state is continued by other code only where its user says so.

What counts is what decides a state's bits once its data are there: models, routing, training, packing. Comments,
docstrings and blank lines do not, nor do evaluation, preparation and the control plane.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import io
import tokenize
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.errors import CodeError
from orchestrator.spec.providers import Use

JOBS = Path(__file__).resolve().parent.parent
FOLDERS = ("moe", "models", "train")
FILES = ("data/packing.py", "data/spans.py", "node/ranks.py", "node/sockets.py", "threads.py")
# In these folders, yet not in a training step: import, export, interventions, and how states are written.
APART = (
    "models/convert.py",
    "models/export.py",
    "models/layouts.py",
    "models/public.py",
    "models/shared_start.py",
    "models/shards.py",
    "models/sources.py",
    "models/upcycle.py",
    "models/vision/checkpoints.py",
    "models/vision/features.py",
    "models/vision/layouts.py",
    "models/vision/onnx_file.py",
    "moe/interventions.py",
    "train/checkpoint.py",
    "train/errors.py",
    "train/init.py",
    "train/kept.py",
)


@cache
def code_digest(root: Path = JOBS) -> str:
    """Return the digest of the training code that this process runs."""
    found = {path.relative_to(root).as_posix() for folder in FOLDERS for path in (root / folder).rglob("*.py")}
    names = sorted((found | set(FILES)) - set(APART))
    lines = [f"{name} {_sha256(essence((root / name).read_text('utf-8')))}" for name in names]
    return _sha256("\n".join(lines))[:16]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def essence(source: str) -> str:
    """Return Python source without comments, docstrings, blank lines and trailing space, whatever Python reads it."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = node.body[0] if node.body else None
            if not isinstance(text, ast.Expr) or not isinstance(text.value, ast.Constant):
                continue
            start, stop = text.lineno - 1, text.end_lineno or text.lineno
            before, after = lines[start].encode()[: text.col_offset], lines[stop - 1].encode()[text.end_col_offset :]
            if isinstance(text.value.value, str) and not before.strip() and not after.strip():
                lines[start:stop] = [""] * (stop - start)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def package_digests(uses: Iterable[Use]) -> dict[str, str]:
    """Return package -> digest of its code, of packages that a stage uses; a plugin file's content is in its key."""
    return {use.origin.provider: _package_digest(str(use.origin)) for use in uses if not use.origin.file}


@cache
def _package_digest(origin: str) -> str:
    """Return the digest of a distribution "NAME VERSION": its version and the Python files that it installed."""
    files = importlib.metadata.files(origin.rpartition(" ")[0]) or ()
    paths = sorted((str(file), Path(str(file.locate()))) for file in files if file.suffix == ".py")
    lines = [f"{name} {_sha256(essence(path.read_text('utf-8')))}" for name, path in paths if path.is_file()]
    return _sha256("\n".join([origin, *lines]))[:16]


def differing_code(provenance: Mapping[str, Any], uses: Iterable[Use] = ()) -> tuple[str, str] | None:
    """Return (its digest, ours) where a state was made by other training code, None if not or not recorded.

    Of packages those count that both the state and the stage, with its `uses`, have.
    """
    made, own = str(provenance.get("code", "")), code_digest()
    if made and made != own:
        return made, own
    recorded = provenance.get("package_code", {})
    for name, digest in package_digests(uses).items():
        if recorded.get(name, digest) != digest:
            return f"{name} {recorded[name]}", f"{name} {digest}"
    return None


def refuse_other_code(provenance: Mapping[str, object], what: str, uses: Iterable[Use] = ()) -> None:
    """Raise CodeError when a state would be continued by other training code than made it."""
    differing = differing_code(provenance, uses)
    if differing is None:
        return
    commit = str(provenance.get("git", ""))[:12]
    made = f"{differing[0]}{f' (commit {commit})' if commit else ''}"
    raise CodeError(
        f"{what} would be continued by other training code",
        cause=f"code {made} made it, this is {differing[1]}",
        hint="run the code that made it; or accept the change with --allow-code, where it changes no result; or train "
        "again under a key of its own: raise the version of what changed (orchestrator/spec/versions.py)",
    )
