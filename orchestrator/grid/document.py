"""A grid file with its includes, its recipe, its scale and the command line, as one set of sections and cell layers.

Later wins: recipe, scale file, included grids, the grid, the grid's `scales.<scale>`, the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from orchestrator import resources
from orchestrator.errors import did_you_mean
from orchestrator.files.bounds import MAX_DEPTH, bound, raising
from orchestrator.files.problems import Problems, brief
from orchestrator.files.yaml_positions import Document, Path, parse_yaml, read_mapping
from orchestrator.grid.factors import short_names
from orchestrator.grid.files import COMMAND_LINE, GRIDS, NAME
from orchestrator.grid.plugin_files import PluginReader
from orchestrator.grid.renamed import renew, renewed, renewed_value
from orchestrator.grid.vocabulary import meaning
from orchestrator.resources import show
from orchestrator.spec.fields import field_paths

# Sections that are mappings, merged over those of other files -> how one is written.
MERGED = {
    "factors": "as in factors: {freeze: [none, router], seed: [0, 1]}",
    "baseline": "as in baseline: {freeze: none}",
    "when": "as in when: {adapter_targets: {adapter_rank: [8]}}",
    "with": "as in with: {preset: {xmoe: {variant: libmoe_lm}}}",
    "set": "as in set: {finetune.steps: 80}",
}
REPLACED = ("description", "also", "exclude", "priority", "evaluate", "at", "primary", "search", "adaptive", "runnable")
SAID = {"evaluate": "suites", "at": "at"}  # sections that are fields of `evaluate`
TOP = ("name", "base", "include", "plugins", "scales")
RECIPE = ("phase", "plain_seed")


@dataclass(slots=True)
class Section:
    """One section's data and where each of its keys and items was written."""

    data: Any
    places: dict[Path, str]
    over: int = 0  # how many layers were written before it

    def place(self, *path: str | int) -> str:
        """Return the place of `path` inside the section, or of its nearest ancestor."""
        for stop in range(len(path), -1, -1):
            if path[:stop] in self.places:
                return self.places[path[:stop]]
        return ""


@dataclass(slots=True)
class Layer:
    """Nested cell fields of one origin; `default` are those of a recipe or a scale, not of the grid itself."""

    data: dict[str, Any]
    places: dict[tuple[str, ...], str]
    default: bool = False


@dataclass(slots=True)
class GridDocument:
    """Everything that was written about one grid at one scale."""

    name: str
    base: str
    path: str
    scale: str
    phase: str
    plain_seed: str
    complete: bool = True  # False when the recipe is missing, so that there is no cell to build
    narrowed: bool = False  # the scale or the command line changed the axes, so that an exclusion may be idle
    sections: dict[str, Section] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)


class Loader:
    """Reads a grid's files; problems are collected, not raised."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.sections: dict[str, Section] = {}
        self.layers: list[Layer] = []
        self.top: dict[str, Section] = {}
        self.complete = False
        self.phase = self.plain_seed = "pretrain"
        self.included = 0
        self.plugins = PluginReader(problems)
        self.empty: set[str] = set()  # places of keys with nothing behind them
        self.defaults = True  # while the recipe and the scale's file are read

    def load(self, path: FilePath, scale: str, overrides: Sequence[str]) -> GridDocument:
        """Return the document of the grid file `path` at `scale`."""
        chain = self._chain(path, ())
        if self.plugins.broken:  # every name of theirs would be unknown as well
            self.problems.raise_if_any()
        if not chain[-1].data:
            self.problems.raise_if_any()
        for document in chain:
            for key in ("name", "base"):
                # An included grid gives its recipe, never its name.
                if key in document.data and (key == "base" or document is chain[-1]):
                    self.top[key] = _section(document.data, document.places, (key,))
        name = self._name(path)
        base, phase, plain_seed = self._recipe(show(path))
        self.phase, self.plain_seed = phase, plain_seed
        overlays = [overlay for document in chain for overlay in self._overlays(document)]
        self._scale(scale, show(path))
        self.defaults = False
        for document in chain:
            self._apply(document.data, document.places, (*TOP, *MERGED, *REPLACED))
        narrowed = bool(overrides)
        for overlay_name, overlay in overlays:
            if overlay_name == scale:
                self._apply(overlay.data, overlay.places, (*MERGED, *REPLACED))
                narrowed = narrowed or ("exclude" not in overlay.data and bool({"factors", "also"} & set(overlay.data)))
        for override in overrides:
            self._override(override)
        for key, field_name in SAID.items():
            if key in self.sections:
                section = self.sections[key]
                value = section.data if isinstance(section.data, list) else [section.data]
                place: dict[tuple[str, ...], str] = {("evaluate", field_name): section.place()}
                self.layers.append(Layer({"evaluate": {field_name: value}}, place))
        return GridDocument(
            name, base, show(path), scale, phase, plain_seed, self.complete, narrowed, self.sections, self.layers
        )

    def _read(self, path: FilePath) -> Document:
        document = read_mapping(path, show(path), self.problems)
        renew(document)
        self._report_empty(document)
        return document

    def _report_empty(self, document: Document) -> None:
        """Report keys and items with nothing behind them: a forgotten value would read as null, which removes."""
        for path in sorted(document.empty, key=lambda path: document.place(path)):
            if not path or (path[0] == "scales" and len(path) == 2):
                continue  # an empty file is reported as a whole; a scale that changes nothing may be named
            key = ".".join(str(part) for part in path)
            self.empty.add(document.place(path))
            what = f"{key} has no value" if isinstance(path[-1], str) else f"{key}: an item of the list has no value"
            hint = "give it a value, or write null if that is meant" + (
                "" if path[0] == "set" else ", which removes it"
            )
            self.problems.add(what, document.place(path), key, hint)

    def _chain(self, path: FilePath, above: tuple[FilePath, ...]) -> list[Document]:
        """Return the included documents, in order, and last the document itself."""
        document = self._read(path)
        chain: list[Document] = []
        includes = document.data.get("include", [])
        for i, include in enumerate(includes if isinstance(includes, list) else [includes]):
            where = document.places.get(("include", i)) or document.places[("include",)]
            # Beside the file, else in grids/: a copy of a grid elsewhere still finds what it includes.
            beside, shared = ((folder / str(include)).resolve() for folder in (path.parent, GRIDS))
            target = shared if shared.is_file() and not beside.is_file() else beside
            if not isinstance(include, str) or not include:
                self.problems.add(f"include must name a file, not {include!r}", where, "include")
            elif not (target.is_relative_to(path.parent) or target.is_relative_to(GRIDS)):
                hint = "include files beside the grid or from grids/"
                self.problems.add(f"include {include!r} leaves the folder of the grid", where, "include", hint)
            elif not target.is_file():
                hint = did_you_mean(include, sorted(file.name for file in path.parent.glob("*.yaml")), "files")
                self.problems.add(f"include {include!r} does not exist", where, "include", hint)
            elif target == path or target in above:
                self.problems.add(f"include {include!r} includes itself", where, "include", "remove one of them")
            else:
                self.included += 1
                if self.included == (most := bound("MOEGRID_MAX_INCLUDES")) + 1:
                    hint = raising("MOEGRID_MAX_INCLUDES", 10 * most)
                    self.problems.add(f"more than {most} files are included", where, "include", hint)
                if self.included <= most:
                    chain.extend(self._chain(target, (*above, path)))
        self.plugins.read(document, path)
        return [*chain, document]

    def _name(self, path: FilePath) -> str:
        section = self.top.get("name", Section(path.stem, {(): f"{show(path)}:1"}))
        if isinstance(section.data, str) and NAME.match(section.data):
            return section.data
        self.problems.add(
            f"name {section.data!r} is not a plain name",
            section.place(),
            "name",
            "leave .json out of it: a key of the store would also be a folder"
            if str(section.data).endswith(".json")
            else "use letters, digits, _ . and -: names and paths from a grid cannot leave the store's prefix",
        )
        return path.stem

    def _recipe(self, grid: str) -> tuple[str, str, str]:
        """Lay the recipe's fields down first; return its name, its phase and what its plain seed means."""
        section = self.top.get("base", Section("", {(): f"{grid}:1"}))
        base = section.data
        recipe = resources.find("recipe", str(base)) if base else None
        if not base:
            hint = f"add base: one of {', '.join(sorted(resources.files('recipe')))}"
            self.problems.add("base is missing: it names the recipe", section.place(), "base", hint)
        elif recipe is None:
            hint = did_you_mean(str(base), sorted(resources.files("recipe")), "recipes")
            self.problems.add(f"recipe {base!r} does not exist", section.place(), "base", hint)
        else:
            document = self._read(recipe)
            if lacking := [key for key in RECIPE if key not in document.data]:
                hint = "phase and plain_seed say what a plain factor and a plain seed mean"
                self.problems.add(f"recipe {base!r} lacks {lacking[0]}", show(recipe), "base", hint)
                return str(base), "pretrain", "pretrain"
            self.complete = True
            self._layer({key: value for key, value in document.data.items() if key not in RECIPE}, document.places)
            return base, str(document.data["phase"]), str(document.data["plain_seed"])
        return str(base), "pretrain", "pretrain"

    def _overlays(self, document: Document) -> list[tuple[str, Section]]:
        """Return the `scales` sections of one document by scale."""
        scales = document.data.get("scales", {})
        if not isinstance(scales, dict):
            hint = "as in scales: {tiny: {set: {finetune.steps: 80}}}"
            self.problems.add(
                f"scales must be a mapping, not {brief(scales)}", document.places[("scales",)], "scales", hint
            )
            return []
        found = []
        for name in scales:
            if resources.find("scale", str(name)) is None:
                near = did_you_mean(name, sorted(resources.files("scale")), "scales")
                own = f"; one of your own is a file: grids/scales/{name}.yaml" if NAME.match(str(name)) else ""
                place = document.places[("scales", name)]
                self.problems.add(f"scales names {name!r}, which is no scale", place, f"scales.{name}", near + own)
            section = _section(document.data, document.places, ("scales", name))
            if section.data is None:
                section.data = {}
            if isinstance(section.data, dict):
                found.append((name, section))
            else:
                self.problems.add(f"scale {name!r} must be a mapping of sections", section.place(), f"scales.{name}")
        return found

    def _scale(self, scale: str, grid: str) -> None:
        """Apply the scale's own file; what it sets for a phase that the recipe does not have is left out."""
        file = resources.find("scale", scale)
        if file is not None:
            document = self._read(file)
            absent = [key for key, value in self.layers[0].data.items() if value is None] if self.layers else []
            fields = document.data.get("set") or {}
            document.data["set"] = {key: value for key, value in fields.items() if key not in absent}
            self._apply(document.data, document.places, ("description", "runnable", "set"))
            self.sections.pop("description", None)
        else:
            known = sorted(resources.files("scale"))
            self.problems.add(f"scale {scale!r} is unknown", grid, "scales", did_you_mean(scale, known, "scales"))

    def _apply(self, data: Mapping[str, object], places: Mapping[Path, str], known: Sequence[str]) -> None:
        """Put the sections in `data` over those so far."""
        before = len(self.layers)
        for key, value in data.items():
            place = places.get((key,), "")
            if key not in known:
                hint = self._section_hint(str(key), known)
                self.problems.add(f"section {key!r} is unknown", place, str(key), hint)
            elif key in MERGED and not isinstance(value, dict):
                self.problems.add(f"{key} must be a mapping, not {brief(value)}", place, key, MERGED[key])
            elif key == "set":
                section = _section(data, places, (key,))
                self._layer(section.data, section.places)
            elif key in MERGED:
                self._merge(key, _section(data, places, (key,)))
            elif key in REPLACED and value is None:
                self.sections.pop(key, None)
            elif key in REPLACED:
                self.sections[key] = _section(data, places, (key,), before)

    def _section_hint(self, key: str, known: Sequence[str]) -> str:
        """Return what is meant by an unknown section: a field of a cell, a word of another tool, a near name."""
        near = did_you_mean(key, known)
        if near.startswith("did you mean"):
            return near
        names = short_names(self.phase, self.plain_seed)
        if key in names or any(path[0] == key for path in field_paths()):
            field = ".".join(names[key][0]) if key in names else key
            return f"fields of a cell stand under set: ({field}), what varies under factors:"
        meant = meaning(key, self.phase)
        if meant and (meant.split(" ")[2].partition(".")[0],) in {path[:1] for path in field_paths()}:
            meant += "; fields of a cell stand under set:"
        return meant or did_you_mean(key, known, "sections")

    def _merge(self, key: str, section: Section) -> None:
        """Merge a section by its first keys; null removes one that is there."""
        merged = self.sections.setdefault(key, Section({}, {}))
        for name, value in section.data.items():
            if value is None and name not in merged.data and not (key == "factors" and self._in_also(name)):
                self._nothing_to_remove(key, str(name), merged, section.place(name))
            for path in [path for path in merged.places if path[:1] == (name,)]:
                del merged.places[path]
            if value is None:
                merged.data.pop(name, None)
            else:
                merged.data[name] = value
        merged.places.update(section.places)

    def _nothing_to_remove(self, key: str, name: str, merged: Section, place: str) -> None:
        if place in self.empty:
            return  # it was reported as forgotten
        near = did_you_mean(name, merged.data)
        hint = near if near.startswith("did") else "give it a value; null removes one that was written before"
        self.problems.add(f"{key}.{name}: null removes nothing", place, f"{key}.{name}", hint)

    def _layer(self, data: Mapping[str, object], places: Mapping[Path, str]) -> None:
        """Add a layer of cell fields; dotted keys (`finetune.lr`) become nested ones."""
        nested: dict[str, Any] = {}
        origins: dict[tuple[str, ...], str] = {}
        for key, value in data.items():
            path = tuple(str(key).split("."))
            if len(path) > MAX_DEPTH:
                self.problems.add(f"{brief(key)} is nested too deeply", places.get((key,), ""), "set")
                continue
            target = nested
            for part in path[:-1]:
                inner = target.get(part)
                target[part] = dict(inner) if isinstance(inner, dict) else {}
                target = target[part]
            old = target.get(path[-1])
            target[path[-1]] = deep(old, value)
            for written, place in places.items():
                if written[:1] == (key,):
                    origins[(*path, *(str(part) for part in written[1:]))] = place
        self.layers.append(Layer(nested, origins, self.defaults))

    def _override(self, text: str) -> None:
        """Apply one command-line override `section[.key]=value`."""
        key, equals, value_text = text.partition("=")
        key = renewed(key.strip())
        section, _, rest = key.partition(".")
        where = f"{COMMAND_LINE}: {text}"
        known = (*MERGED, *REPLACED)
        keyed = (*MERGED, "search", "adaptive")
        if not equals or section not in known or (rest and section not in keyed) or (section in MERGED and not rest):
            hint = "write factors.seed=[0,1], set.finetune.lr=1e-4 or at=[1.0]"
            meant = meaning(key, self.phase) if section not in known else ""
            hint = f"{meant}; {hint}" if meant else hint
            self.problems.add(f"override {text!r} is not section.key=value", COMMAND_LINE, key, hint)
            return
        before = len(self.problems.found)
        value = parse_yaml(value_text, where, self.problems).data
        if not value_text.strip():
            hint = "give it a value, or write null if that is meant"
            self.problems.add(f"override {text!r} has no value", COMMAND_LINE, key, hint)
        if len(self.problems.found) > before:
            return
        value = renewed_value(key, value, COMMAND_LINE)
        if section in REPLACED and rest:
            old = self.sections.get(section, Section({}, {}))
            data = {**old.data, rest: value} if isinstance(old.data, dict) else {rest: value}
            self.sections[section] = Section(data, {**old.places, (): where, (rest,): where})
            return
        places: dict[Path, str] = {(section,): where, (section, rest): where}
        self._apply({section: {rest: value} if rest else value}, places, known)
        if section == "factors":
            self._also(rest, value, where)

    def _in_also(self, name: str) -> bool:
        also = self.sections.get("also", Section([], {})).data
        return any(isinstance(product, dict) and name in product for product in also if isinstance(also, list))

    def _also(self, name: str, values: object, where: str) -> None:
        """Give the products of `also` that have the axis `name` its new values (None: no such axis) too."""
        also = self.sections.get("also", Section([], {}))
        for i, product in enumerate(also.data if isinstance(also.data, list) else []):
            if isinstance(product, dict) and name in product:
                for path in [path for path in also.places if path[:2] == (i, name)]:
                    del also.places[path]
                also.places[(i, name)] = where
                if values is None:
                    del product[name]
                else:
                    product[name] = values


def deep(old: object, new: object) -> Any:
    """Return `new` laid over `old`: mappings merge, anything else replaces."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{key: deep(old.get(key), value) for key, value in new.items()}}


def _section(data: Mapping[str, object], places: Mapping[Path, str], path: Path, over: int = 0) -> Section:
    """Return the part of a document below `path`, its places relative to it."""
    inner: Any = data
    for part in path:
        inner = inner[part]
    size = len(path)
    return Section(inner, {written[size:]: place for written, place in places.items() if written[:size] == path}, over)
