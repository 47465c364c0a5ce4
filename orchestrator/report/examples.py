"""A page of a data set's examples, with their pictures: one HTML file that works offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.catalog.pins import package_of
from orchestrator.report.html import shell

_STYLE = """.examples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(15rem,100%),1fr));gap:.8rem}
.example{border:1px solid var(--line);border-radius:6px;padding:.6rem;min-width:0;font-size:.86rem}
.example p{overflow-wrap:anywhere}
.example img{display:block;max-width:100%;min-width:96px;height:auto;background:#fff;margin:0 auto .5rem;
image-rendering:pixelated}.example p{margin:.25rem 0;white-space:pre-wrap}.example b{color:var(--quiet);font-weight:500}
.example .marks{color:var(--quiet);font-size:.78rem}
.wide{grid-template-columns:repeat(auto-fill,minmax(min(30rem,100%),1fr))}
.example .scrolled{max-height:18rem;overflow-y:auto}"""
_SAFE = ("data:image/png;base64,", "data:image/jpeg;base64,")


@dataclass(frozen=True, slots=True)
class Shown:
    """One row: texts by what they are, the names of its pictures, and marks such as its split."""

    texts: Mapping[str, str]
    images: Sequence[str]
    marks: Sequence[str]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one kind, some of `count`."""

    name: str
    count: int
    rows: Sequence[Shown]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the data plane says of a set: its kinds of rows, and pictures as data addresses by name."""

    groups: Sequence[Group]
    images: Mapping[str, str]

    @classmethod
    def read(cls, document: Mapping[str, object]) -> Answer:
        """Return the answer of a JSON document."""
        groups, images = document["groups"], document["images"]
        assert isinstance(groups, list)
        assert isinstance(images, dict)
        rows = [[Shown(row["texts"], row["images"], row["marks"]) for row in group["rows"]] for group in groups]
        return cls([Group(one["name"], one["count"], shown) for one, shown in zip(groups, rows, strict=True)], images)


def page(source: str, answer: Answer) -> str:
    """Return the page; everything that comes from the set is escaped, and nothing is loaded from elsewhere."""
    package = package_of(source)
    licence = f"<p>licence of the content: {escape(package.licence)}</p>" if package and package.licence else ""
    links = "".join(f'<a href="#g{n}">{escape(group.name)}</a>' for n, group in enumerate(answer.groups))
    sections = "".join(_section(number, group, answer.images) for number, group in enumerate(answer.groups))
    head = f"<style>{_STYLE}</style><h1>{escape(source)}</h1>{licence}<nav>{links}</nav>"
    return shell(source, head + (sections or "<p>no rows</p>"))


def _section(number: int, group: Group, images: Mapping[str, str]) -> str:
    wide = "" if any(row.images for row in group.rows) else " wide"
    cards = "".join(_card(row, images) for row in group.rows)
    title = f"{escape(group.name)} <span class=quiet>{len(group.rows):,} of {group.count:,}</span>"
    return f'<section id="g{number}"><h2>{title}</h2><div class="examples{wide}">{cards}</div></section>'


def _card(row: Shown, images: Mapping[str, str]) -> str:
    found = [images.get(name, "") for name in row.images]
    pictures = "".join(f'<img src="{escape(one)}" alt="" loading="lazy">' for one in found if one.startswith(_SAFE))
    texts = "".join(f'<p class="scrolled"><b>{escape(name)}</b> {escape(text)}</p>' for name, text in row.texts.items())
    marks = f'<p class="marks">{escape("  ·  ".join(row.marks))}</p>' if row.marks else ""
    return f'<div class="example">{pictures}{texts}{marks}</div>'
