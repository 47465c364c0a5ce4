"""Objects under any sequence of operations: what a dictionary with versions would do, in a folder and in memory."""

from __future__ import annotations

import tempfile
import uuid

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from orchestrator.store import Objects
from orchestrator.store.opening import open_objects

PATHS = ("a", "a-1", "b/c", "b/d")
Seen = tuple[str, str]  # a path, and a version that it once had


class Machine(RuleBasedStateMachine):
    """Every write has its own bytes, as the contract of `Objects` demands."""

    seen: Bundle[Seen] = Bundle("seen")

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, bytes] = {}
        self.versions: dict[Seen, bytes] = {}
        self.writes = 0
        self.objects = self.open()

    def open(self) -> Objects:
        raise NotImplementedError

    def bytes(self) -> bytes:
        self.writes += 1
        return f"{self.writes}".encode()

    @rule(path=st.sampled_from(PATHS))
    def put(self, path: str) -> None:
        self.model[path] = data = self.bytes()
        self.objects.put(path, data)

    @rule(path=st.sampled_from(PATHS))
    def create(self, path: str) -> None:
        data = self.bytes()
        assert self.objects.create(path, data) == (path not in self.model)
        self.model.setdefault(path, data)

    @rule(path=st.sampled_from(PATHS))
    def delete(self, path: str) -> None:
        self.objects.delete(path)
        self.model.pop(path, None)

    @rule(target=seen, path=st.sampled_from(PATHS))
    def look(self, path: str) -> Seen:
        found = self.objects.read(path)
        assert (None if found is None else found.data) == self.model.get(path)
        version = "" if found is None else found.version
        if found is not None:
            assert self.versions.setdefault((path, version), found.data) == found.data, "a version returned"
        return path, version

    @rule(seen=seen)
    def replace(self, seen: Seen) -> None:
        """Replace by a version that may be stale."""
        path, version = seen
        if not version:
            return
        data, current = self.bytes(), self.model.get(path)
        fresh = current is not None and current == self.versions[seen]
        assert self.objects.replace(path, data, version) == fresh
        if fresh:
            self.model[path] = data

    @rule(seen=consumes(seen))
    def race(self, seen: Seen) -> None:
        """Of two who replace the same version one wins."""
        path, version = seen
        current = self.model.get(path)
        if not version or current is None or current != self.versions[seen]:
            return
        first, second = self.bytes(), self.bytes()
        assert self.objects.replace(path, first, version)
        assert not self.objects.replace(path, second, version)
        self.model[path] = first

    @invariant()
    def lists_what_there_is(self) -> None:
        own = {path: len(data) for path, data in self.model.items()}
        assert {entry.path: entry.size for entry in self.objects.list("") if entry.path in PATHS} == own


class Folder(Machine):
    def open(self) -> Objects:
        self.folder = tempfile.TemporaryDirectory()
        return open_objects(self.folder.name)

    def teardown(self) -> None:
        self.folder.cleanup()


class Memory(Machine):
    def open(self) -> Objects:
        return open_objects(f"memory://{uuid.uuid4().hex}")


Folder.TestCase.settings = Memory.TestCase.settings = settings(max_examples=25, stateful_step_count=25)
TestFolder, TestMemory = Folder.TestCase, Memory.TestCase
