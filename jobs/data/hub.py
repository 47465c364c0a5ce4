"""Repositories of the hub, each read at one commit; what goes wrong there says what to do.

Nothing of a repository is executed: data files and weights are read, loading scripts are not even fetched. Files lie in
huggingface_hub's cache, which goes on with a broken download where it stopped.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.data.hub_sets import HUB_SETS, HubName, hub_name, is_gated, joined
from orchestrator.errors import SourceAway, SourceError

log = logging.getLogger(__name__)
T = TypeVar("T")
Row = Mapping[str, Any]

# How long a job waits while the hub answers that it is busy, and while it does not answer at all.
BUSY_SECONDS = 300.0
AWAY_SECONDS = 15.0
LONGEST_PAUSE = 30.0
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)
_BUSY = (408, 429, 500, 502, 503, 504)
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
_DATA = ("*.parquet", "*.json*", "*.csv*", "*.txt*", "*.arrow")  # and packed ones, as .jsonl.gz
TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
CONVERTED = "refs/convert/parquet"  # the branch on which the hub keeps its own Parquet copy of a set


class HubAway(SourceAway):
    """The hub does not answer, or answers that it is `busy`: trying again later can help."""

    failure_kind = "unreachable"
    busy = False


def snapshot(source: str, patterns: Sequence[str], *, kind: str = "model", revision: str = "") -> Path:
    """Return the folder of a repository's files that match `patterns`, all of one commit: the folder's name.

    `kind` is `model` or `dataset`. SourceAway when trying again may help (HubAway: by itself), SourceError when not.
    """
    from huggingface_hub import snapshot_download

    name = hub_name(source)
    wanted = revision or name.revision or None

    def fetch() -> Path:
        try:
            return Path(snapshot_download(name.name, repo_type=kind, revision=wanted, allow_patterns=list(patterns)))
        except Exception as error:  # the client raises many unrelated types
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                raise
            raise refused(source, error) from None

    folder = _patiently(fetch)
    _COMMITS[name.name, name.revision] = folder.name
    return folder


def read_at(*sources: str) -> dict[str, dict[str, str]]:
    """Return `commits`: hub source -> the commit at which this process read it; {} when it read none."""
    names = {source: hub_name(source) for source in sources if source.startswith("hub://")}
    read = {source: _COMMITS.get((name.name, name.revision), "") for source, name in names.items()}
    known = {source: commit for source, commit in read.items() if commit}
    return {"commits": known} if known else {}


_COMMITS: dict[tuple[str, str], str] = {}  # (name, revision) -> commit


def load_hub(source: str, split: str | None) -> Any:
    """Return the rows of a data set (`hub://ORG/NAME[:CONFIG][@REVISION]`): of one split, or of all by split.

    Rows are read as they are asked for. SourceError when there is no such set, configuration, split or file.
    """
    name = hub_name(source)
    card = snapshot(source, ["README.md"], kind="dataset")
    log.info("%s is read at commit %s", source, card.name)
    splits = _configured(source, name, card) or _found(source, name, card.name)
    found = {part: _rows(source, rows) for part, rows in splits.items()}
    if split is None:
        return found
    if split not in found:
        raise SourceError(f"{source} has no split {split!r}", cause=f"it has {', '.join(found)}")
    return found[split]


def refused(source: str, error: BaseException) -> SourceError:
    """Return what an error of the hub's clients means, and what to do about it."""
    if isinstance(error, SourceError):
        return error
    chain = list(_chain(error))
    kinds = {cls.__name__ for seen in chain for cls in type(seen).__mro__}
    status = next((code for seen in chain if (code := _status(seen))), 0)
    name = hub_name(source).name
    said = f"{type(chain[-1]).__name__}: {_first_line(chain[-1])}"
    elsewhere = "or fetch it on another machine and use file://"
    if "OfflineModeIsEnabled" in kinds:
        return SourceAway(
            f"{source} is not on this machine, and the hub is switched off",
            cause="HF_HUB_OFFLINE is set, and the cache (HF_HOME) does not hold this revision",
            hint=f"unset HF_HUB_OFFLINE where jobs run, {elsewhere}",
        )
    if "GatedRepoError" in kinds or status == 403 or (status == 401 and is_gated(source)):
        return SourceAway(
            f"{source} is gated: {'this account may not' if status == 403 else 'nobody without a token may'} read it",
            cause=f"the hub answered {status or 'no'}: {said}",
            hint=f"accept the terms on the page of {name}, set HF_TOKEN to a token of that account where jobs run, "
            + elsewhere,
        )
    if "RevisionNotFoundError" in kinds:
        revision = hub_name(source).revision or "main"
        return SourceError(f"{name} has no revision {revision!r}", cause=said, hint="name a commit, a branch or a tag")
    if status in (401, 404) or "RepositoryNotFoundError" in kinds:
        # Strangers are not told whether a repository is missing or private.
        return (SourceAway if status == 401 else SourceError)(
            f"the hub has no {source}, or keeps it private",
            cause=f"it answered {status}: {said}",
            hint="check the name; a private one needs HF_TOKEN, set to a valid token where jobs run",
        )
    if status in _BUSY:
        busy = HubAway(
            f"the hub is busy: {source} could not be read",
            cause=f"it answered {status}: {said}",
            hint="moegrid resume tries again; with HF_TOKEN set the hub allows more requests",
        )
        busy.busy = True
        return busy
    if kinds & _AWAY:
        return HubAway(
            f"the hub cannot be reached from this machine: {source} could not be read",
            cause=said,
            hint=f"check the network, a proxy (HTTPS_PROXY) or a mirror (HF_ENDPOINT) where jobs run, {elsewhere}",
        )
    return SourceError(
        f"{source} could not be read from the hub", cause=said, hint=f"check the name and the revision, {elsewhere}"
    )


_AWAY = frozenset(
    ("ConnectError", "TimeoutException", "NetworkError", "ProtocolError", "ProxyError", "ConnectionError", "timeout")
)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


def _patiently(fetch: Callable[[], T]) -> T:
    """Return `fetch()`, tried again with growing pauses while the hub is busy or away."""
    started, pause = time.monotonic(), 1.0
    while True:
        try:
            return fetch()
        except HubAway as error:
            patience = BUSY_SECONDS if error.busy else AWAY_SECONDS
            if time.monotonic() + pause > started + patience:
                raise
            log.warning("%s (%s); trying again in %.0f s", error.error, error.cause, pause)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def _configured(source: str, name: HubName, card: Path) -> Mapping[str, Any]:
    """Return the splits of the configuration as the data card declares it, {} when it declares none."""
    from huggingface_hub import metadata_load

    readme = card / "README.md"
    try:
        data = (metadata_load(readme) if readme.is_file() else None) or {}
    except Exception as error:  # YAML of strangers
        raise SourceError(f"the card of {source} cannot be read", cause=_first_line(error)) from None
    configs = {
        str(config["config_name"]): config
        for config in data.get("configs") or ()
        if isinstance(config, Mapping) and config.get("config_name") and config.get("data_files")
    }
    if not configs:
        return {}
    paths: dict[str, list[str]] = {}
    for config in joined(name.config or _default(name, configs), configs):
        if config not in configs:
            raise SourceError(
                f"{name.name} has {f'no configuration {config!r}' if config else 'several configurations'}",
                cause=f"it has {', '.join(configs)}",
                hint=f"write hub://{name.name}:CONFIG, several as A+B, or all of them as *",
            )
        below = str(configs[config].get("data_dir") or "").strip("/")
        for split, files in _by_split(configs[config]["data_files"]).items():
            paths.setdefault(split, []).extend(f"{below}/{path}" if below else path for path in files)
    folder = snapshot(source, [path for found in paths.values() for path in found], kind="dataset", revision=card.name)
    builder = _builder(source, [path for found in paths.values() for path in found], folder)
    return _loaded(source, builder, {split: [str(folder / path) for path in found] for split, found in paths.items()})


def _default(name: HubName, configs: Mapping[str, Mapping[str, object]]) -> str:
    marked = [config for config, data in configs.items() if data.get("default")]
    known = list(HUB_SETS[name.name].configs)[:1] if name.name in HUB_SETS else []
    sole = list(configs) if len(configs) == 1 else []
    return next((config for config in (*marked, "default", *sole, *known) if config in configs), "")


def _by_split(files: Any) -> dict[str, list[str]]:
    """Return the paths of `data_files` of a card: one or several paths, or items of split and path."""
    if isinstance(files, str):
        return {"train": [files]}
    found: dict[str, list[str]] = {}
    for item in files:
        split, path = (str(item["split"]), item["path"]) if isinstance(item, Mapping) else ("train", item)
        found.setdefault(split, []).extend([path] if isinstance(path, str) else path)
    return found


def _builder(source: str, paths: Sequence[str], folder: Path) -> str:
    for path in paths:
        for file in sorted(folder.glob(path)) or [Path(path)]:
            known = [suffix for suffix in file.suffixes if suffix in _BUILDERS]
            if known:
                return _BUILDERS[known[-1]]
    raise SourceError(f"{source} has no data files that can be read", cause=f"its card names {', '.join(paths)}")


def _found(source: str, name: HubName, commit: str) -> Mapping[str, Any]:
    """Return the splits of a repository whose card declares no configuration, by the names of its files."""
    below = f"{name.config}/" if name.config else ""
    folder = snapshot(source, [below + pattern for pattern in _DATA], kind="dataset", revision=commit) / below
    known = HUB_SETS.get(name.name)
    if below and not folder.is_dir() and known is not None and list(known.configs) == [name.config]:
        folder = snapshot(source, _DATA, kind="dataset", revision=commit)
    if not folder.is_dir() or not any(folder.rglob("*.*")):
        raise SourceError(
            f"{source} has no data files that can be read",
            cause=f"neither its card nor a folder says what the configuration {name.config!r} is"
            if below
            else "it may hold a loading script, which is not run",
            hint=f"set revision: {CONVERTED} (the hub's Parquet copy of many sets), or fetch it and use file://",
        )
    return _loaded(source, str(folder), None)


def _loaded(source: str, path: str, files: Mapping[str, Sequence[str]] | None) -> Mapping[str, Any]:
    import datasets

    try:
        loaded: Mapping[str, object] = datasets.load_dataset(path, data_files=files, streaming=True)
    except Exception as error:  # of many types: no files, a wrong pattern, files of no known kind
        raise SourceError(f"{source} has no data files that can be read", cause=_first_line(error)) from None
    return loaded


def _rows(source: str, rows: Any) -> Iterator[Row]:
    try:
        # Pictures are decoded within our bounds, not where they are read.
        for row in rows.decode(False) if hasattr(rows, "decode") else rows:
            yield dict(row)
    except SourceError:
        raise
    except Exception as error:  # whatever a damaged or odd file makes its reader raise
        raise SourceError(
            f"{source} could not be read", cause=f"{type(error).__name__}: {_first_line(error)}"
        ) from None
