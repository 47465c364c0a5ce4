"""The sets of questions about pictures that the pinned packages give: examples to train on, items to ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from jobs.data.corpora import VisionExample
from jobs.data.fetching import parse_package
from jobs.data.images import digest_of, require_pillow
from jobs.data.pictures.drawings import MOST_HELD_OUT, Drawing, drawings_of, share_of
from jobs.data.pictures.questions import QUESTIONS, Asked, Pool
from orchestrator.catalog.pictures import ITEMS, MIXED, NEGATIVES, VISION_TASKS
from orchestrator.catalog.pictures import QUESTIONS as ALL_QUESTIONS
from orchestrator.catalog.pins import PACKAGES, Package
from orchestrator.data.local_data import identifier, joined
from orchestrator.errors import SourceError

Item = dict[str, object]
# The two drawers of one set of identities.
_DRAWERS = ("emoji-datasource-google", "emoji-datasource-twitter")


def picture_examples(source: str, seed: int, images: dict[str, bytes]) -> list[VisionExample]:
    """Return the examples of a set `npm://NAME@VERSION/SET`; their pictures go into `images` by digest.

    They are of the identities that are trained on, whatever the seed, which draws wrong names and places. SourceError
    where the source is none of these sets.
    """
    package, part = parse_package(source, ("npm", "deb"))
    if part == ITEMS:
        raise SourceError(f"{source} holds items", hint="it can be used in evaluation")
    found = []
    for subtask in MIXED if part == ALL_QUESTIONS else (part,):
        for asked in QUESTIONS[subtask](_pool(package, subtask, trained=True, seed=f"{seed}")):
            # One yes and one no a drawing: the no is of one of the three ways.
            if subtask == "existence" and asked.part != _way(asked.identity):
                continue
            found.append(_example(asked, package, images))
    return list({example.id: example for example in found}.values())


def picture_items(
    source: str, tasks: Iterable[str], images: dict[str, bytes]
) -> Iterator[tuple[str, dict[str, list[Item]]]]:
    """Yield (task, its split `test`) of a set of items, about identities that nothing is trained on.

    Of one task at most MOST_HELD_OUT. SourceError for a task that the package cannot answer.
    """
    package, _ = parse_package(source, ("npm", "deb"))
    for task in tasks:
        subtask = VISION_TASKS.get(task)
        asked = list(QUESTIONS[subtask.name](_pool(package, subtask.name, trained=False))) if subtask else []
        asked = [one for one in asked if not one.part or task.endswith(f"_{one.part}")]
        if not asked:
            known = f"it is no question about pictures: {', '.join(VISION_TASKS)}" if subtask is None else ""
            raise SourceError(f"{source} has no items of task {task!r}", cause=known, hint="leave the task out")
        # Questions about one thing stay together: to each yes its no.
        asked.sort(key=lambda one: share_of(f"asked/{one.identity}"))
        rows = [_item(one, images) for one in asked[:MOST_HELD_OUT]]
        yield task, {"test": sorted(rows, key=lambda row: (str(row["identity"]), str(row["id"])))}


def _way(identity: str) -> str:
    return NEGATIVES[int(share_of(f"way/{identity}") * len(NEGATIVES))]


def _pool(package: Package, subtask: str, *, trained: bool, seed: str = "") -> Pool:
    drawings = _of(package)
    others: tuple[Drawing, ...] = ()
    if subtask == "drawer" and package.name in _DRAWERS:
        other = next(name for name in _DRAWERS if name != package.name)
        others = _of(PACKAGES[package.scheme, other])
    held_out = package.scheme != "npm"  # a whole source, of which nothing is trained on

    def mine(drawing: Drawing) -> bool:
        return held_out or drawing.trained == trained

    return Pool([*filter(mine, drawings)], [*filter(mine, others)], f"{package.sha256}/{seed}")


@lru_cache(maxsize=2)
def _of(package: Package) -> tuple[Drawing, ...]:
    require_pillow(package.url)
    return tuple(drawings_of(package))


def _example(asked: Asked, package: Package, images: dict[str, bytes]) -> VisionExample:
    digest = digest_of(asked.image)
    images.setdefault(digest, asked.image)
    response = joined(asked.prompt, asked.answer)
    name = f"{asked.subtask}/{identifier(asked.prompt, response, digest)}"
    where = (asked.group, asked.identity, asked.subtask)
    return VisionExample(name, package.name, asked.prompt, response, (digest,), *where)


def _item(asked: Asked, images: dict[str, bytes]) -> Item:
    digest = digest_of(asked.image)
    images.setdefault(digest, asked.image)
    return {
        "id": f"{asked.subtask}/{identifier(asked.prompt, *asked.choices, digest)}",
        "images": [digest],
        "prompt": asked.prompt,
        "choices": list(asked.choices),
        "label": asked.label,
        "answer": asked.answer,
        "group": asked.group,
        "identity": asked.identity,
        "subtask": asked.subtask,
    }
