"""What a grid can say, where ranks hold rows: the curve of one process, equal bits resumed, other numbers of ranks."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from orchestrator.spec.attention import LatentSpec, MultiplierSpec, RopeSpec
from orchestrator.spec.cell import Resources, StopSpec
from orchestrator.spec.training import AdapterSpec
from orchestrator.spec.work import TrainWork
from orchestrator.store import Store
from tests.integration.test_training_ranks import FOUR, LONG, TWO, fresh, losses, run
from tests.training import MODEL, segments, state_bits, tensors

SHARED = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, preset="deepseek_moe", shared_experts=1))
TRAIN = dataclasses.replace(LONG, steps=20, weight_decay=0.1)
# Every part of an attention that goes with the others, and those of latents.
PARTS = dataclasses.replace(
    SHARED,
    backbone="llama",
    num_heads=4,
    qk_norm="head",
    attention_bias="all",
    attention_window=6,
    full_every=2,
    attention_sinks=True,
    norm_order="post",
    rope=RopeSpec(fraction=0.5, scaling="llama3", factor=4.0, original_context=16),
    multipliers=MultiplierSpec(embedding=2.0, attention=0.3, residual=0.7, logits=1.5),
)
LATENT = dataclasses.replace(
    SHARED,
    backbone="deepseek_moe",
    latent=LatentSpec(kv_rank=12, q_rank=10, plain_dim=8, rotary_dim=4, value_dim=6),
    rope=RopeSpec(interleaved=True, scaling="yarn", factor=4.0, original_context=16, mscale=1.0, mscale_all_dim=0.7),
)
# At a higher rate the last digits, other ones on each CPU, grow to a tenth of a thousandth within these steps.
MUON = dataclasses.replace(TRAIN, optimizer="muon", lr=1e-3)
ADAPTED = dataclasses.replace(TRAIN, adapter=AdapterSpec(3, 8.0, "attention+expert", "trained"))
# The phase ends behind the third of its windows.
STOPPED = dataclasses.replace(TRAIN, stop=StopSpec("lm_loss", every=5, below=3.95))
WORDS = {
    "muon": (MUON, SHARED),
    "muon in bf16": (dataclasses.replace(MUON, precision="bf16"), SHARED),
    "adapters": (ADAPTED, SHARED),
    "latents": (TRAIN, LATENT),
    "early stopping": (STOPPED, PARTS),
}
CURVE = ("train/lm_loss", "train/grad_norm", "train/tokens")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="extra deepspeed is absent")


@pytest.mark.parametrize(
    ("word", "engine", "resources"),
    [
        ("muon", "fsdp", TWO),
        ("adapters", "fsdp", TWO),
        ("early stopping", "fsdp", TWO),
        # Only in the whole harness (make faults): they share their code with the above.
        pytest.param("latents", "fsdp", TWO, marks=pytest.mark.faults),
        pytest.param("muon in bf16", "fsdp", TWO, marks=pytest.mark.faults),
        pytest.param("muon", "fsdp shard 2 expert 2", FOUR, marks=pytest.mark.faults),
        pytest.param("adapters", "fsdp expert 2", TWO, marks=pytest.mark.faults),
        pytest.param("adapters", "deepspeed:2", TWO, marks=[needs_deepspeed, pytest.mark.faults]),
    ],
)
def test_ranks_that_hold_rows_train_as_one_process_does(
    tmp_path: Path, word: str, engine: str, resources: Resources
) -> None:
    train, model = WORDS[word]
    works = segments((("", 0, 8), ("router", 8, 20)), train, model=model)
    close = 1e-4 if train.precision == "fp32" else 1e-2
    one, straight, apart = (fresh(tmp_path, name, model) for name in ("one", "straight", "apart"))
    run(one, works, "one-0", "torch", Resources())
    run(straight, works, "straight-0", engine, resources)
    curve = losses(one, works, CURVE)
    assert losses(straight, works, CURVE) == pytest.approx(curve, rel=close)
    run(apart, works[:1], "apart-0", engine, resources)
    shutil.copytree(tmp_path / "apart", tmp_path / "other")
    run(apart, works[1:], "apart-1", engine, resources)
    assert state_bits(apart, works[1].key()) == state_bits(straight, works[1].key())
    other = Store.open(str(tmp_path / "other"))
    run(other, works[1:], "other-0", "torch", Resources(), allow_numerics=True)
    assert losses(other, works, CURVE) == pytest.approx(curve, rel=close)
    ends = [ended(store, works[1]) for store in (one, straight, apart, other)]
    assert ends == [15 if train.stop.metric else None] * 4
    # What is not trained keeps its bits, and its state.
    before, after = (tensors(straight, work.key(), "optimizer") for work in works)
    routers = [name for name in before if ".router." in name]
    assert routers
    assert all(torch.equal(before[name], after[name]) for name in routers)
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    own = {"momentum_buffer": train.optimizer == "muon", "master": train.precision == "bf16"}
    assert moved == {"exp_avg", "exp_avg_sq", "step", *(name for name, there in own.items() if there)}


def ended(store: Store, work: TrainWork) -> int | None:
    """Return the step behind which a phase ended early, None where it did not."""
    manifest = store.artifacts.get(work.key())
    assert manifest is not None
    stopped: int | None = manifest.info.get("stopped_at")
    return stopped
