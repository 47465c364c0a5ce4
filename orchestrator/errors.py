"""Every error that moegrid shows to a person: what is wrong, why, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_PENDING = 4
EXIT_DETACHED = 130
# A node's own exit code after it checkpointed on a signal: the stage resumes free of charge.
EXIT_PREEMPTED = 75
# A node's own exit code when the store, a disk or a service was in the way and not the work: `resume` tries again.
EXIT_AWAY = 69
# A node's own exit code when another process has the stage: nothing was done, nothing is tried again.
EXIT_NOT_MINE = 76
# What a node says in its log at its end, where the store may not take it: a failure's record, or that all is there.
SPOKEN_FAILURE = "moegrid-failure"
SPOKEN_END = "moegrid-committed"


class MoegridError(Exception):
    """An error with a cause and a remedy.

    `exit_code` is what the command line returns. `str(e)` is the `error / cause / hint` text.
    """

    exit_code = EXIT_USAGE

    def __init__(self, error: str, *, cause: str = "", hint: str = "") -> None:
        super().__init__(error)
        self.error = error
        self.cause = cause
        self.hint = hint

    def __str__(self) -> str:
        lines = [f"error: {self.error}"]
        if self.cause:
            lines.append(f"cause: {self.cause}")
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a file: what, where (`file:line`), which key, and the remedy."""

    message: str
    where: str = ""
    key: str = ""
    hint: str = ""

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        hint = f"\n  hint: {self.hint}" if self.hint else ""
        return f"error: {self.message}{place}{hint}"


class GridError(MoegridError):
    """All problems of the files of a grid, or of a site, at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        hint = self.problems[0].hint if len(self.problems) == 1 else ""
        super().__init__(f"{len(self.problems)} problem(s) in what was written", hint=hint)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class StoreError(MoegridError):
    """The object store refused or could not be reached; `transient` if trying again later can help."""

    transient = False
    exit_code = EXIT_UNREACHABLE


class CorruptBlob(StoreError):
    """A blob's size or checksum is not what its manifest says; the artifact must be made again."""

    def __init__(self, artifact: str, path: str, cause: str) -> None:
        super().__init__(
            f"artifact {artifact[:12]} is damaged: {path}",
            cause=cause,
            hint="moegrid resume makes it again from its parents (of a large store: moegrid resume --verify)",
        )
        self.artifact = artifact
        self.path = path


class LeaseLost(MoegridError):
    """Another attempt holds a newer fencing token: this one must stop before it commits anything."""

    exit_code = EXIT_FAILED


class ArtifactMissing(MoegridError):
    """A parent's artifact is not in the store: damaged, collected or lost since the stage was planned."""

    failure_kind = "parent_missing"


class SourceError(MoegridError):
    """A data source (wheel, file, hub) does not exist, has the wrong digest or lacks a column."""

    exit_code = EXIT_UNREACHABLE


class SourceAway(SourceError):
    """A data source that has to be fetched could not be reached."""


class ServiceAway(MoegridError):
    """A service that a stage asks, a moderation server say, could not be reached or did not answer as it should."""

    failure_kind = "unreachable"


class NumericsError(MoegridError):
    """A state would be continued under other numerics (threads, world size, engine, torch version, CPU)."""

    exit_code = EXIT_FAILED


class CodeError(MoegridError):
    """A state would be continued by other training code than made it."""

    exit_code = EXIT_FAILED


class PluginError(MoegridError):
    """A package or plugin file that the work needs is not on this machine as it was planned with."""

    exit_code = EXIT_FAILED
    failure_kind = "plugin"


class TrainingDiverged(MoegridError):
    """The loss or a gradient is not finite; the last good state is kept."""

    exit_code = EXIT_FAILED


def nearest(word: object, known: Iterable[str]) -> str:
    """Return a hint with the nearest of the `known` words, "" if none is near."""
    import difflib  # only what goes wrong pays for it

    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""


def did_you_mean(word: object, known: Iterable[str], what: str = "known") -> str:
    """Return a hint: the nearest of the `known` words, or all of them."""
    words = list(known)
    return nearest(word, words) or (f"{what}: {', '.join(words)}" if words else "")
