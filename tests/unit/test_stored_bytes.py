"""A plan reckons the bytes of states from shapes alone, and they are those that are written."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator import cli
from orchestrator.grid.load import load_grid
from orchestrator.plan.cost import parameters
from orchestrator.plan.graph import build_graph
from orchestrator.plan.moments import continuations
from orchestrator.plan.plan import make_plan
from orchestrator.plan.stored import KINDS, begun, following
from orchestrator.plan.summary import to_json
from orchestrator.spec.cell import BalanceSpec
from orchestrator.store import Manifest, Store
from orchestrator.ui.console import Console
from orchestrator.ui.plan_view import show_plan
from tests.training import TRAIN, VOCABULARY, init_work, prepare, run_chain, segments


def written(store: Store, key: str) -> Counter[str]:
    """Return the bytes of the tensors in a state's own files, by kind."""
    manifest = store.artifacts.get(key)
    assert manifest is not None
    found: Counter[str] = Counter()
    for blob in manifest.blobs:
        path = store.objects.local_path(blob.path)
        if path is None or blob.name not in ("weights.safetensors", "optimizer.safetensors"):
            continue
        for name, tensor in load_file(path).items():
            slot = name.rpartition(".")[2]
            kind = "weights" if blob.name.startswith("weights") else {"master": "master weights"}.get(slot, "moments")
            found[kind] += tensor.nbytes if slot != "step" else 0
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_of_frozen_roles(tmp_path: Path, precision: str) -> None:
    torch.set_num_threads(1)
    store = prepare(str(tmp_path))
    run_chain(store, [init_work()], "init")
    train = dataclasses.replace(TRAIN, precision=precision, balance=BalanceSpec())
    works = segments([("expert", 0, 1), ("expert", 1, 2), ("router", 2, 3), ("expert", 3, 4)], train)
    run_chain(store, works, light=works[3:])
    sizes = parameters(works[0].model, VOCABULARY).roles
    state = begun(sizes)
    for number, work in enumerate(works):
        state = following(state, work.conditions.train, sizes, begins=not number, whole=number < 3)
        assert written(store, work.key()) == +state.bytes, number


def test_a_plan_tells_the_bytes_of_each_kind() -> None:
    plan = make_plan(build_graph(load_grid("finetune_freeze", scale="paper")), ())
    told = to_json(plan)
    assert told["store_bytes"].keys() == set(KINDS)
    for kind, size in told["store_bytes"].items():
        assert size == sum(row["store_bytes"][kind] for row in told["phases"])
    stream = io.StringIO()
    show_plan(plan, Console(stream))
    (line,) = (line for line in stream.getvalue().splitlines() if line.startswith("  store: "))
    assert "TB (weights " in line
    assert "moments " in line


def test_every_seed_has_the_same_bytes() -> None:
    totals = []
    for seeds in ([0], [0, 1]):
        told = to_json(make_plan(build_graph(load_grid("finetune_freeze", scale="tiny", seeds=seeds)), ()))
        row = next(row for row in told["phases"] if row["phase"] == "finetune")
        totals.append(row["store_bytes"]["weights"])
    assert totals[1] == 2 * totals[0] > 0


def test_explain_says_where_a_segment_is_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = build_graph(load_grid("quickstart"))
    half, following = next((key, found) for key in graph.stages if (found := continuations(graph, key)))
    store = Store.open(str(tmp_path / "store"))
    for moments in (False, True):
        info = {"weights_sha256": "0" * 64, "moments": moments}
        store.artifacts.commit(Manifest(half, "train", {}, info=info))
        assert cli.main(["explain", "quickstart", "--json", "--store", str(tmp_path / "store")]) == 0
        stages = [stage for cell in json.loads(capsys.readouterr().out)["cells"] for stage in cell["stages"]]
        told = {stage["key"] for stage in stages if "trained again" in stage["reason"]}
        assert told == (set() if moments else set(following))
