"""Questions about pictures whose answers follow from labels: the subtasks, their tasks, the sets of packages.

The truth of every answer is the package's own label, or follows from how the picture was put together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# The eight groups that a picture is sorted into, as an answer says them.
GROUPS = ("face", "person", "animal or plant", "food", "place or vehicle", "activity", "object", "symbol")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "grey", "white")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two", "three", "four")
NEGATIVES = ("random", "popular", "adversarial")


@dataclass(frozen=True, slots=True)
class Subtask:
    """One kind of question. `tasks`: the names under which it is evaluated; `choices`: how many answers there are."""

    name: str
    tasks: tuple[str, ...]
    choices: int


def _subtask(name: str, choices: int, parts: tuple[str, ...] = ()) -> Subtask:
    return Subtask(name, tuple(f"vision_{name}_{part}" for part in parts) or (f"vision_{name}",), choices)


SUBTASKS: Mapping[str, Subtask] = MappingProxyType(
    {
        subtask.name: subtask
        for subtask in (
            _subtask("captions", 4),
            _subtask("group", len(GROUPS)),
            _subtask("existence", 2, NEGATIVES),
            _subtask("colour", len(COLOURS)),
            _subtask("reading", 4),
            _subtask("counting", len(NUMBERS)),
            _subtask("position", len(CORNERS)),
            _subtask("clock", 4),
            _subtask("drawer", 2),
        )
    }
)
VISION_TASKS: Mapping[str, Subtask] = MappingProxyType(
    {task: subtask for subtask in SUBTASKS.values() for task in subtask.tasks}
)
# All questions that one drawer's pictures answer: `drawer` needs the other one's, which are else held out.
QUESTIONS = "questions"
MIXED = tuple(name for name in SUBTASKS if name not in ("captions", "drawer"))
TRAINING_SETS = (*SUBTASKS, QUESTIONS)
ITEMS = "items"
