"""A package with a source of data of its own: books of made-up sentences, and items of one task."""

from __future__ import annotations

BOOKS = """
import hashlib
import random

from orchestrator.catalog.sources import SourceKind

KNOWN = {"primer": 3, "novel": 5}


def pin(source, revision, folder):
    book = source.removeprefix("books://")
    if book not in KNOWN:
        raise ValueError(f"there is no book {book!r}, only {', '.join(KNOWN)}")
    return source, hashlib.sha256(f"{book} {KNOWN[book]} {revision}".encode()).hexdigest()


def sentence(chance):
    return " ".join("".join(chance.choices("bdfgaeiou", k=4)) for _ in range(12)) + "."


def rows(data):
    chance = random.Random(KNOWN[data.source.removeprefix("books://")])
    if data.format == "instruction":
        return [{"prompt": sentence(chance), "response": sentence(chance)} for _ in range(120)]
    return [{"text": " ".join(sentence(chance) for _ in range(12))} for _ in range(60)]


def items(data, task):
    row = {"goal": "open a tin", "sol1": "use a tin opener", "sol2": "use a spoon", "label": 0}
    return {"validation": [row, row | {"goal": "open a can"}]}


BOOKS = SourceKind("books", "books:pin", rows="books:rows", items="books:items")
LISTS = SourceKind("lists", "books:pin", rows="books:rows", version=2)
"""
NAMES = {"sources": {"books": "books:BOOKS", "lists": "books:LISTS"}}
