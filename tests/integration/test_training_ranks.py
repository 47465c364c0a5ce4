"""Training on two ranks under every engine: freezing and resume keep their bits, losses agree with one process."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.data.packing import open_batches
from jobs.models.building import build_model
from jobs.models.roles import parameter_roles
from jobs.models.shards import shard_names
from jobs.models.weights import load_canonical, weights_sha256
from jobs.train.meter import load_entropy
from orchestrator.catalog.engines import ENGINES
from orchestrator.spec.cell import BalanceSpec, Execution, Parallel, Resources
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.work import TrainWork, Work
from orchestrator.store import Store
from tests import training
from tests.lion import LION, NAMES
from tests.packages import found, install
from tests.training import (
    EXECUTION,
    MODEL,
    TRAIN,
    failure,
    init_work,
    key,
    prepare,
    segments,
    start,
    state_bits,
    submit,
)

TWO = Resources(processes=2)
FOUR = Resources(processes=4)
# Of three micro-batches one rank has two: in every step the other has a turn without one.
LONG = dataclasses.replace(TRAIN, steps=50, expert_dropout=0.0, accumulation=3)
CUTS = (("", 0, 12), ("router", 12, 50))
SERIES = (
    "train/lm_loss",
    "train/aux_loss",
    "train/z_loss",
    "train/grad_norm",
    "train/router_passed_grad_norm",
    "train/tokens",
    "routing/load_balance",
)
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="extra deepspeed is absent")
CASES = [
    ("torch", "fp32"),
    ("fsdp", "fp32"),
    ("fsdp expert 2", "fp32"),
    pytest.param("deepspeed:3", "fp32", marks=needs_deepspeed),
    pytest.param("deepspeed:3", "bf16", marks=[needs_deepspeed, pytest.mark.faults]),
    pytest.param("deepspeed:2", "fp32", marks=needs_deepspeed),
    # Only in the whole harness (make faults): they share their code with the above.
    pytest.param("deepspeed:2", "bf16", marks=[needs_deepspeed, pytest.mark.faults]),
    pytest.param("fsdp", "bf16", marks=pytest.mark.faults),
    pytest.param("torch", "fp16", marks=pytest.mark.faults),
    pytest.param("fsdp", "fp16", marks=pytest.mark.faults),
    pytest.param("fsdp expert 2", "bf16", marks=pytest.mark.faults),
    pytest.param("deepspeed:1", "fp32", marks=[needs_deepspeed, pytest.mark.faults]),
    pytest.param("deepspeed:1", "bf16", marks=[needs_deepspeed, pytest.mark.faults]),
]


def executed(engine: str, **more: Any) -> Execution:
    """Return how a job runs under `engine`, also under `fsdp expert E` and `fsdp shard S expert E`."""
    name, *words = engine.split()
    parallel = Parallel(**{word: int(number) for word, number in zip(words[::2], words[1::2], strict=True)})
    return dataclasses.replace(EXECUTION, engine=name, parallel=parallel, **more)


def run(
    store: Store,
    works: Sequence[Work],
    name: str,
    engine: str,
    resources: Resources = TWO,
    code: int = 0,
    **more: Any,
) -> None:
    process = start(submit(store, works, name, resources=resources, execution=executed(engine, **more)))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output


def fresh(path: Path, name: str, model: ModelSpec = MODEL) -> Store:
    from tests.training import run_chain

    store = prepare(str(path / name))
    run_chain(store, [init_work(model)], "init")
    return store


def blobs(store: Store, key: str, folder: Path) -> Path:
    """Copy the blobs of an artifact to `folder` and return it."""
    folder.mkdir()
    manifest = store.artifacts.get(key)
    assert manifest is not None
    for blob in manifest.blobs:
        store.artifacts.fetch(manifest, blob.name, folder)
    return folder


def losses(store: Store, works: list[TrainWork], series: tuple[str, ...] = SERIES) -> list[float]:
    rows = []
    for work in works:
        manifest = store.artifacts.get(work.key())
        assert manifest is not None
        rows += json.loads(store.artifacts.read(manifest.blob("series.json")))
    return [row[name] for row in rows for name in series if name in row]


def tensors(store: Store, key: str, kind: str = "weights") -> dict[str, torch.Tensor]:
    manifest = store.artifacts.get(key)
    assert manifest is not None
    own = [name for name in shard_names(manifest, kind) if "-shared-" not in name]
    assert len(own) == manifest.numerics["world_size"]
    return training.tensors(store, key, kind)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    store = fresh(tmp_path_factory.mktemp("one"), "store")
    works = segments(CUTS, LONG)
    run(store, works, "one-0", "torch", Resources())
    return losses(store, works)


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the undisturbed run of engine torch on two ranks."""
    store = fresh(tmp_path_factory.mktemp("two"), "store")
    run(store, segments(CUTS, LONG), "two-0", "torch")
    return store


def test_data_parallel_losses_are_those_of_one_process(one_process: list[float], data_parallel: Store) -> None:
    assert losses(data_parallel, segments(CUTS, LONG)) == pytest.approx(one_process, rel=1e-4)


@pytest.mark.parametrize("engine, precision", CASES)
def test_engine(tmp_path: Path, engine: str, precision: str, data_parallel: Store) -> None:
    works = segments(CUTS, dataclasses.replace(LONG, precision=precision))
    if (engine, precision) == ("torch", "fp32"):
        straight = data_parallel
    else:
        straight = fresh(tmp_path, "straight")
        run(straight, works, "straight-0", engine)
    if precision == "fp32":
        assert losses(straight, works) == pytest.approx(losses(data_parallel, works), rel=1e-4)
    half, end = (tensors(straight, work.key()) for work in works)
    routers = [name for name, _, role in parameter_roles(build_model(MODEL, 64)) if role == "router"]
    for name in half:
        moved = not torch.equal(half[name], end[name])
        assert not (moved and name in routers), name
        # In bf16 one of the smallest updates of a norm's weight may be rounded away.
        assert moved or name in routers or precision == "bf16", name
    # Stopped in the frozen half by a signal, gone on in fresh processes.
    cut = fresh(tmp_path, "cut")
    execution = executed(engine, checkpoint_steps=7)
    process = start(submit(cut, works, "cut-1", resources=TWO, execution=execution))
    deadline = time.monotonic() + 400
    kept = [works[1].key_at(step) for step in (14, 21, 28)]  # any of them: one is skipped while two are written
    while not any(map(cut.artifacts.get, kept)) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 75, output
    # What the backward pass computes again changes no bit.
    recompute = "layer" if ENGINES.get(engine.split()[0]).recomputes else "none"
    run(cut, works[1:], "cut-2", engine, recompute=recompute)
    assert state_bits(cut, works[1].key()) == state_bits(straight, works[1].key())


@pytest.mark.faults
def test_in_bf16_the_curve_with_dealt_experts_is_that_of_one_rank(tmp_path: Path) -> None:
    works = segments(CUTS, dataclasses.replace(LONG, precision="bf16"))
    one, dealt = fresh(tmp_path, "one"), fresh(tmp_path, "dealt")
    run(one, works, "one-0", "torch", Resources())
    run(dealt, works, "dealt-0", "fsdp expert 2")
    curve = ("train/lm_loss",)
    assert losses(dealt, works, curve) == pytest.approx(losses(one, works, curve), rel=1e-2)


AUX_FREE = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, preset="aux_free"))
GLOBAL = dataclasses.replace(LONG, steps=3, balance=BalanceSpec(aux_coef=1.0, aux_scope="global", bias_rate=0.01))


@pytest.mark.parametrize(
    "engine",
    [
        "torch",
        "fsdp",
        pytest.param("fsdp expert 2", marks=pytest.mark.faults),
        pytest.param("deepspeed:3", marks=needs_deepspeed),
        pytest.param("deepspeed:2", marks=[needs_deepspeed, pytest.mark.faults]),
    ],
)
def test_a_turn_without_a_micro_batch_adds_nothing_to_what_ranks_sum(tmp_path: Path, engine: str) -> None:
    (work,) = segments((("", 0, 3),), GLOBAL, model=AUX_FREE)
    store = fresh(tmp_path, "store", AUX_FREE)
    run(store, [work], "two-0", engine, log_every=1, hang_seconds=60.0)
    (row, _, last) = json.loads((blobs(store, work.key(), tmp_path / "state") / "series.json").read_bytes())
    loss, counts_LN = expected_at_first(store, tmp_path)
    assert row["train/aux_loss"] == pytest.approx(loss, rel=1e-5)
    assert row["routing/load_balance"] == pytest.approx(load_entropy(counts_LN), rel=1e-6)
    assert last["train/tokens"] == 3 * 3 * GLOBAL.micro_batch * GLOBAL.sequence_length


def expected_at_first(store: Store, folder: Path) -> tuple[float, list[list[float]]]:
    """Return the load loss of the first step by its definition, f over the micro-batches of a turn, and its counts."""
    model = build_model(AUX_FREE, 64)
    load_canonical(model, load_file(blobs(store, init_work(AUX_FREE).key(), folder / "init") / "weights.safetensors"))
    source = open_batches("text", blobs(store, key("text"), folder / "text"), GLOBAL.sequence_length, 0, accumulation=3)
    ids = [source.micro_batch(0, index, GLOBAL.micro_batch).input_ids for index in range(3)]
    layers = range(AUX_FREE.num_layers)
    with torch.no_grad():
        routed = [model(each).routings for each in ids]
    losses = []
    for turn in ((0, 1), (2,)):
        for own in turn:
            for layer in layers:
                counts = sum(routed[index][layer].counts for index in turn).double()
                p = routed[own][layer].logits.double().softmax(-1).mean(0)
                losses.append(float((counts / sum(ids[index].numel() for index in turn) * p).sum() * 4 / 2))
    counts_LN = [sum(each[layer].counts for each in routed).tolist() for layer in layers]
    return sum(losses) / len(losses), counts_LN


@pytest.mark.parametrize(
    "engine",
    [
        "fsdp",
        pytest.param("deepspeed:2", marks=needs_deepspeed),
        pytest.param("deepspeed:3", marks=[needs_deepspeed, pytest.mark.faults]),
    ],
)
def test_another_packages_optimizer_freezes_and_resumes(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = dataclasses.replace(LONG, steps=9, optimizer="lion", weight_decay=0.1, lr=1e-3)
    straight, apart = fresh(tmp_path, "straight"), fresh(tmp_path, "apart")
    install(tmp_path / "site", "lions", LION, NAMES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with found(tmp_path / "site", "lions"):
        works = segments((("", 0, 3), ("lower", 3, 6), ("", 6, 9)), train)
        run(straight, works, "straight-0", engine)
        for index, work in enumerate(works):
            run(apart, [work], f"apart-{index}", engine)
        assert state_bits(apart, works[-1].key()) == state_bits(straight, works[-1].key())
        begun, frozen, ended = (tensors(straight, work.key(), "optimizer") for work in works)
    router = next(name for name in begun if ".router." in name and name.endswith(".momentum"))
    assert torch.equal(begun[router], frozen[router])
    assert not torch.equal(frozen[router], ended[router])
    assert float(ended[router.replace(".momentum", ".taken")]) == 6


def test_another_world_size_is_refused_unless_allowed(tmp_path: Path, one_process: list[float]) -> None:
    works = segments(CUTS, LONG)
    store = fresh(tmp_path, "store")
    run(store, works[:1], "two-0", "torch")
    run(store, works[1:], "one-0", "torch", Resources(), code=1)
    record = failure(store, "one-0")
    assert record["kind"] == "numerics"
    assert "world_size 2 -> 1" in record["message"]
    # One process reads the shards of two, and goes on within rounding of a run that never changed.
    run(store, works[1:], "one-1", "torch", Resources(), allow_numerics=True)
    assert losses(store, works) == pytest.approx(one_process, rel=1e-4)
    manifest = store.artifacts.get(works[1].key())
    assert manifest is not None
    assert manifest.info["mixed_numerics"]


def test_another_mesh_is_refused_unless_allowed(tmp_path: Path, one_process: list[float]) -> None:
    works = segments(CUTS, LONG)
    store = fresh(tmp_path, "store")
    run(store, works[:1], "pieces-0", "fsdp expert 2", FOUR)
    run(store, works[1:], "copies-0", "fsdp shard 2 expert 2", FOUR, code=1)
    record = failure(store, "copies-0")
    assert record["kind"] == "numerics"
    assert "mesh data 1 x shard 4, expert 2 -> data 2 x shard 2, expert 2" in record["message"]
    # Of every layer's experts each file of a state holds rows of its own.
    run(store, works[1:], "copies-1", "fsdp shard 2 expert 2", FOUR, allow_numerics=True)
    assert losses(store, works) == pytest.approx(one_process, rel=1e-4)
    for work in works:
        model = build_model(MODEL, 64)
        load_canonical(model, tensors(store, work.key()))
        manifest = store.artifacts.get(work.key())
        assert manifest is not None
        assert manifest.info["weights_sha256"] == weights_sha256(model)


@needs_deepspeed
def test_a_state_in_runs_of_elements_goes_on_under_another_engine_and_not_with_other_ranks_of_its_own(
    tmp_path: Path, data_parallel: Store
) -> None:
    works = segments(CUTS, LONG)
    store = fresh(tmp_path, "store")
    run(store, works[:1], "zero-0", "deepspeed:3")
    manifest = store.artifacts.get(works[0].key())
    assert manifest is not None
    # Rows, and their digest, are those of any other engine.
    weights = tensors(store, works[0].key())
    model = build_model(MODEL, 64)
    load_canonical(model, weights)
    assert manifest.info["weights_sha256"] == weights_sha256(model)
    run(store, works[1:], "zero-1", "torch", Resources(), code=1)
    run(store, works[1:], "zero-2", "torch", Resources(), code=1, allow_numerics=True)
    record = failure(store, "zero-2")
    assert record["kind"] == "numerics"
    assert "of 2 processes under engine 'deepspeed:3', and this job has 1" in record["message"]
    run(store, works[1:], "zero-3", "fsdp", allow_numerics=True)
    assert losses(store, works) == pytest.approx(losses(data_parallel, works), rel=1e-4)
