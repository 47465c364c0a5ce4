"""Safe YAML with the line of every key: no tags, no code, no duplicate keys.

Scalars follow YAML 1.2 (`1e-5` is a number; `no`, `off`, `1:30` and dates are text). A sequence as a key, as in
`[a, b]: [[1, 2], [3, 4]]`, reads as the text "a, b". Every YAML file of the project is read here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from orchestrator.files.bounds import MAX_DEPTH, bound, raising
from orchestrator.files.problems import Problems

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Composes nodes only; its implicit scalar types are those of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {}
_NULL, _BOOL, _INT, _FLOAT, _STR, _MAP, _SEQ = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq")
)
_Loader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def _compose(text: str) -> yaml.Node | None:
    """Return the node tree, read by libyaml where it is there; errors are always worded by the Python parser."""
    if yaml.__with_libyaml__:
        try:
            return yaml.compose(text, Loader=_FastLoader)
        except yaml.YAMLError:
            pass
    return yaml.compose(text, Loader=_Loader)


if yaml.__with_libyaml__:

    class _FastLoader(yaml.CSafeLoader):
        """The same types, composed by libyaml: ten times as fast on a long list of values."""

    _FastLoader.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


@dataclass(slots=True)
class Document:
    """The data of one YAML text and the place (`file:line`) of every key and list item, by path.

    `written` has the text of each number and truth value that Python would write otherwise: `012345`, `1.10`, `true`.
    `empty` are the paths of keys and items with nothing behind them, which read as null.
    """

    data: Any = None
    places: dict[Path, str] = field(default_factory=dict)
    written: dict[Path, str] = field(default_factory=dict)
    empty: set[Path] = field(default_factory=set)

    def place(self, path: Path) -> str:
        """Return the place of `path`, or of its nearest ancestor."""
        return next((self.places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.places), "")


# What a tag (`!function`) makes of the text behind it.
Tags = Mapping[str, Callable[[str], Any]]


def read_mapping(path: FilePath, name: str, problems: Problems, tags: Tags | None = None) -> Document:
    """Return the document of a YAML file, called `name` in messages, whose data are a mapping: {} if it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problems.add(f"cannot read {name}: {error}", name)
        return Document({})
    before = len(problems.found)
    document = parse_yaml(text, name, problems, tags)
    if not isinstance(document.data, dict):
        if len(problems.found) == before:
            empty = document.data is None
            told = "the file is empty" if empty else "the file must be a mapping of sections"
            problems.add(told, f"{name}:1", hint="moegrid init writes a grid to start from" if empty else "")
        document.data = {}
    return document


def parse_yaml(text: str, name: str, problems: Problems, tags: Tags | None = None) -> Document:
    """Return the document in `text`; what is wrong with it goes to `problems` with `name`:line."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        problems.add("the text is not UTF-8", name, hint="write it in UTF-8")
        return Document()
    try:
        if not _within_bounds(text, name, problems):
            return Document()
        node = _compose(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        problems.add(f"not valid YAML: {error.problem or error.context}", where, hint="check indentation and quotes")
        return Document()
    except yaml.YAMLError as error:
        problems.add(f"not valid YAML: {' '.join(str(error).split())}", name)
        return Document()
    document = Document()
    if node is not None:
        document.data = _Reader(name, problems, document, tags or {}).value(node, ())
    return document


def _within_bounds(text: str, name: str, problems: Problems) -> bool:
    """Return whether a text is neither too deep nor too large to be composed, which recurs. Raises YAMLError."""
    loader = _FastLoader if yaml.__with_libyaml__ else _Loader
    depth, nodes, most = 0, 0, bound("MOEGRID_MAX_NODES")
    try:
        for event in yaml.parse(text, Loader=loader):
            if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                depth += 1
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                depth -= 1
            nodes += isinstance(event, yaml.NodeEvent)
            if depth > MAX_DEPTH + 1 or nodes > 2 * most:  # a key is a node too
                where = f"{name}:{event.start_mark.line + 1}" if event.start_mark else name
                hint = "take a level out of it" if depth > MAX_DEPTH else raising("MOEGRID_MAX_NODES", 10 * most)
                problems.add("the YAML is nested too deeply or too large", where, hint=hint)
                return False
    except yaml.YAMLError:
        if loader is _Loader:
            raise
    return True


class _Reader:
    def __init__(self, name: str, problems: Problems, document: Document, tags: Tags) -> None:
        self.name = name
        self.problems = problems
        self.places = document.places
        self.written = document.written
        self.empty = document.empty
        self.most = bound("MOEGRID_MAX_NODES")
        self.tags = tags
        self.nodes = 0

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.nodes += 1
        where = f"{self.name}:{node.start_mark.line + 1}"
        self.places.setdefault(path, where)
        if len(path) > MAX_DEPTH or self.nodes > self.most:
            if self.nodes < 2 * self.most:
                hint = f"check its anchors; {raising('MOEGRID_MAX_NODES', 10 * self.most)}"
                hint = "check its anchors" if len(path) > MAX_DEPTH else hint
                self.problems.add("the YAML is nested too deeply or too large", where, hint=hint)
                self.nodes = 2 * self.most
            return None
        if isinstance(node, yaml.ScalarNode) and node.tag in self.tags:
            return self._tagged(node, where)
        if not isinstance(node, yaml.ScalarNode) and node.tag not in (_MAP, _SEQ):
            self._bad_tag(node.tag, where)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        value = self._scalar(node, where)
        if value is None and node.value == "":
            self.empty.add(path)
        if node.tag in (_BOOL, _INT, _FLOAT) and str(value) != node.value:
            self.written[path] = str(node.value)
        return value

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            where = f"{self.name}:{key_node.start_mark.line + 1}"
            key = self._key(key_node)
            if key is not None and not self._sound(key, where):
                continue
            if key is None:
                self.problems.add("a key must be plain text or a list of factor names", where, hint="quote the key")
                continue
            if key == "<<":
                self.problems.add("merge keys (<<) are not supported", where, hint="use include: or set:")
                continue
            if key in result:
                first = self.places[(*path, key)]
                self.problems.add(f"key {key!r} is given twice", where, key, f"the first one is at {first}")
                continue
            self.places[(*path, key)] = where
            result[key] = self.value(value_node, (*path, key))
        return result

    def _key(self, node: yaml.Node) -> str | None:
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
            return ", ".join(str(item.value) for item in node.value)
        return None

    def _scalar(self, node: yaml.Node, where: str) -> Any:
        text = str(node.value)
        if node.tag == _STR:
            return text if self._sound(text, where) else ""
        if node.tag == _NULL:
            return None
        if node.tag == _BOOL:
            return text.lower() == "true"
        if node.tag in (_INT, _FLOAT):
            try:
                return int(text) if node.tag == _INT else float(text)
            except ValueError:
                self.problems.add(f"{text!r} is not a number", where)
                return None
        self._bad_tag(node.tag, where)
        return text

    def _sound(self, text: str, where: str) -> bool:
        """Return whether a text is one: half of a surrogate pair can be written in YAML, but is no character."""
        wrong = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), "")
        if wrong:
            message = f"the text holds \\u{ord(wrong):04x}, half of a surrogate pair, which is no character"
            hint = "write the character itself, or as \\U with eight digits"
            self.problems.add(message, where, hint=hint)
        return not wrong

    def _tagged(self, node: yaml.ScalarNode, where: str) -> Any:
        try:
            return self.tags[node.tag](str(node.value))
        except (ValueError, AttributeError, ImportError, OSError) as error:
            self.problems.add(f"{node.tag} {node.value}: {error}", where)
            return None

    def _bad_tag(self, tag: str, where: str) -> None:
        self.problems.add(f"the YAML tag {tag!r} is not allowed", where, hint="write plain values")
