"""What a stage uses from outside: in its key and no other's, in its submission, on its node, in its manifest."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.node import code
from jobs.node.plugins import bring_plugins
from jobs.node.preemption import Signals
from jobs.run import run_job
from orchestrator import plugins, registry
from orchestrator.backends.base import ENDED, JobState
from orchestrator.engine.failures import classify
from orchestrator.engine.retry import rule
from orchestrator.errors import CodeError, PluginError
from orchestrator.grid.load import load_grid
from orchestrator.plan.describe import describe_job, plugin_files
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.plan import make_plan
from orchestrator.plan.root import root_digest, root_document
from orchestrator.plan.summary import to_json
from orchestrator.registry import Origin, Registry
from orchestrator.spec import versions
from orchestrator.spec.cell import Resources
from orchestrator.spec.providers import Use, of_all, uses_of
from orchestrator.store import Store
from orchestrator.store.attempts import PlannedJob
from tests.golden_keys import example_works

PYTEST = Origin("pytest", importlib.metadata.version("pytest"))


@dataclass(frozen=True)
class Thing:
    name: str
    version: int = 1


@pytest.fixture
def registries() -> Iterator[None]:
    """Whatever a test registers is gone after it."""
    before = dict(registry.REGISTRIES), dict(registry._BY_WORD)
    yield
    for now, old in zip((registry.REGISTRIES, registry._BY_WORD), before, strict=True):
        now.clear()
        now.update(old)


def provide(named: str, origin: Origin = PYTEST) -> None:
    """Let `origin` provide a name that a real stage uses, as a kind of its own."""
    word, _, name = named.partition(" ")
    versions._PLAIN.clear()  # names of ours, which this registry now takes
    Registry(f"made_up_{word}s", word, Thing, {}).register(Thing(name), origin)


KINDS = tuple(example_works())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_of_every_kind_has_what_it_uses_in_its_key_and_no_other_has(registries: None, kind: str) -> None:
    works = example_works()
    before = {name: work.key() for name, work in works.items()}
    named = next(name for name in works[kind].parts() if name.count(" ") == 1 and _only_of(name, kind))
    provide(named)
    after = {name: work.key() for name, work in example_works().items()}
    # Parents' keys pass a change on; a work on the same parents has its own key only where it uses the name itself.
    own = {name for name, work in works.items() if work.key() != before[name]}
    assert kind in own
    assert own - {kind} <= ({"train"} if kind == "init" else set()), "a training state's key is made of its init's"
    assert after[kind] != before[kind]
    assert [use.origin for use in uses_of(works[kind])] == [PYTEST]
    readers = {"train", "evaluate", "generate"} if kind == "init" else set()
    assert {name for name, work in works.items() if uses_of(work)} == {kind} | readers


def _only_of(named: str, kind: str) -> bool:
    return all(named not in work.parts() for name, work in example_works().items() if name != kind)


@pytest.fixture(scope="module")
def graph() -> StageGraph:
    return build_graph(load_grid("quickstart"))


def test_a_plan_names_what_it_uses_from_outside(registries: None, graph: StageGraph) -> None:
    assert to_json(make_plan(graph, ()))["plugins"] == []
    quiet = root_digest(graph)
    provide("backbone olmoe")
    provide("loss switch", Origin("mine.py", "ab" * 32, file=True))
    shown = [use["shown"] for use in to_json(make_plan(graph, ()))["plugins"]]
    assert shown == ["mine.py abababababab (made_up_losss: switch)", f"{PYTEST} (made_up_backbones: olmoe)"]
    assert root_digest(graph) != quiet
    assert {use["provider"] for use in root_document(graph)["plugins"]} == {"mine.py", "pytest"}


def test_a_job_carries_what_its_stages_use_and_nothing_else(
    registries: None, graph: StageGraph, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        f"from {__name__} import Thing\nfrom orchestrator.registry import Registry\n"
        "Registry('made_up', 'loss', Thing, {})\nX = Thing('switch')\n"
    )
    plugins.register(plugins.read_plugin(tmp_path / "mine.py"))
    provide("backbone olmoe")
    jobs = {
        kind: describe_job(graph, f"b-{kind}", [key], Resources(), {})
        for key, stage in reversed(list(graph.stages.items()))
        for kind in [stage.kind]
    }
    assert [use["provider"] for use in jobs["train"].plugins] == ["mine.py", "pytest"]
    assert [use["provider"] for use in jobs["evaluate"].plugins] == ["pytest"]
    assert "plugins" not in jobs["data"].to_json()
    assert plugin_files([jobs["data"], jobs["evaluate"]]) == {}
    (sent,) = plugin_files(list(jobs.values())).values()
    assert sent == {"name": "mine.py", "files": {"mine.py": (tmp_path / "mine.py").read_text()}}


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (Origin("no-such-package", "1.2"), "this machine has no no-such-package 1.2"),
        (Origin("pytest", "1.2"), f"this machine has {PYTEST}, and not 1.2"),
    ],
)
def test_a_node_refuses_another_version_by_name(registries: None, tmp_path: Path, origin: Origin, said: str) -> None:
    store = Store.open(str(tmp_path / "store"))
    use = Use(origin, {"routers": ("noisy",)})
    stage = {"key": "k" * 64, "label": "one", "work": {"kind": "not even known here"}}
    store.create_json(
        "submissions/b.json", {"jobs": [{"attempt": "b-0", "stages": [stage], "plugins": [use.to_json()]}]}
    )
    assert run_job(store.url, "b", 0, Signals()) == 1
    report = store.get_json("attempts/b-0/failure.json")
    assert said in report["message"]
    assert f"{origin} (routers: noisy)" in report["message"]
    assert f"pip install {origin.provider}==1.2" in report["hint"]
    verdict = classify(JobState(ENDED, 1), report)
    assert verdict.kind == "plugin"
    assert not rule(verdict.kind).outside, "trying again changes nothing"


def using(use: Use) -> PlannedJob:
    return PlannedJob("b-0", "", {}, {}, (), (use.to_json(),))


def test_a_node_with_the_version_that_was_planned_with_goes_on(registries: None, tmp_path: Path) -> None:
    bring_plugins(using(Use(PYTEST, {"routers": ("noisy",)})), [], tmp_path)


def test_a_plugin_file_that_a_node_cannot_import_is_a_fault_of_the_work(registries: None, tmp_path: Path) -> None:
    plugin = plugins.Plugin("mine.py", {"mine.py": "import no_such_module\n"}, "")
    use = Use(plugin.origin, {"routers": ("noisy",)})
    sent = [plugin.to_json()]
    with pytest.raises(PluginError, match=r"plugin 'mine.py' cannot be imported"):
        bring_plugins(using(use), sent, tmp_path)


def test_uses_survive_json_and_join_by_their_provider() -> None:
    one, two = (
        Use(PYTEST, {"routers": ("a",)}),
        Use(PYTEST, {"routers": ("b",), "losses": ("c",)}),
    )
    assert Use.from_json(json.loads(json.dumps(two.to_json()))) == two
    assert of_all([one, two, one]) == (Use(PYTEST, {"losses": ("c",), "routers": ("a", "b")}),)


def test_training_goes_on_under_the_package_code_that_made_the_state() -> None:
    uses = [Use(PYTEST, {"losses": ("z",)}), Use(Origin("mine.py", "ab" * 32, file=True), {"losses": ("y",)})]
    digests = code.package_digests(uses)
    assert set(digests) == {"pytest"}, "the content of a file is in the key"
    made = {"code": code.code_digest(), "package_code": digests}
    code.refuse_other_code(made, "a state", uses)
    code.refuse_other_code({**made, "package_code": {"pytest": "0" * 16}}, "a state", [])
    with pytest.raises(CodeError, match="other training code") as raised:
        code.refuse_other_code({**made, "package_code": {"pytest": "0" * 16}}, "a state", uses)
    assert f"pytest {digests['pytest']}" in raised.value.cause
