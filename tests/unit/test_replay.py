"""Operations from memory: a simulation says the same as one that runs every operation anew, only sooner."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from benchmarks import simulation as bench
from jobs.simulate import world
from jobs.simulate.evaluation import Evaluation, simulate_evaluation
from jobs.simulate.replay import Replay
from jobs.simulate.training import simulate_training
from orchestrator.spec.model import MoESpec
from orchestrator.spec.resolve import resolve_moe
from tests.seeing import SEES

VOCABULARY = 64


def anew(mode):
    return lambda func, args, kwargs: func(*args, **kwargs)


@pytest.mark.parametrize(
    ("engine", "ranks", "block"),
    [("torch", 1, {"preset": "sigma_moe"}), ("fsdp", 2, {"preset": "moepp"}), ("fsdp", 2, {"choice": "expert"})],
)
def test_training_from_memory_is_training(engine, ranks, block, monkeypatch):
    asked = bench.shape("mini", engine, ranks, "bf16")
    moe = resolve_moe(MoESpec(**block, num_experts=4, top_k=2, expert_width=64))
    asked = dataclasses.replace(asked, model=dataclasses.replace(asked.model, moe=moe), words=("", "router"))
    remembered = [simulate_training(asked).to_json() for _ in range(2)]
    monkeypatch.setattr(world, "Replay", anew)
    assert remembered == [simulate_training(asked).to_json()] * 2


def test_an_evaluation_from_memory_is_an_evaluation(monkeypatch):
    asked = Evaluation(SEES, VOCABULARY, 32, "fp32", "cpu", ("text", "tasks", "pictures", "shown"))
    remembered = [simulate_evaluation(asked).to_json() for _ in range(2)]
    monkeypatch.setattr(world, "Replay", anew)
    assert remembered == [simulate_evaluation(asked).to_json()] * 2


def test_what_is_remembered_is_new_memory_a_view_or_the_argument():
    mode = FakeTensorMode()
    replay, aten = Replay(mode), torch.ops.aten

    def again(func: Any, *args: Any) -> Any:
        return replay(func, args, {})

    with mode:
        for _ in range(2):
            x = torch.empty(4, 6)
            own = again(aten.add.Tensor, x, x)
            view = again(aten.slice.Tensor, x, 0, 1, 3)
            assert own.untyped_storage()._cdata != x.untyped_storage()._cdata
            assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert (view.shape, view.stride(), view.storage_offset()) == ((2, 6), (6, 1), 6)
            assert again(aten.mul_.Tensor, x, 2.0) is x
            parts = again(aten.split.Tensor, x, 3, 1)
            assert [part.storage_offset() for part in parts] == [0, 3]
            # A number is not a truth value, though they are equal.
            assert again(aten.sum.dim_IntList, x, [0], True).shape == (1, 6)
            assert again(aten.sum.dim_IntList, x, [0], False).shape == (6,)
            assert again(aten.cumsum.default, x, 1).shape == (4, 6)


def test_what_shapes_do_not_say_is_never_taken_from_memory():
    mode = FakeTensorMode()
    replay, aten = Replay(mode), torch.ops.aten
    with mode:
        x, y = torch.empty(5, 7), torch.empty(5, 7)
        # The first time the result is written over an argument, then to a tensor of its own.
        assert replay(aten.add.out, (x, x), {"out": x}) is x
        assert replay(aten.add.out, (x, x), {"out": y}) is y


def test_the_default_type_is_part_of_what_is_remembered():
    mode = FakeTensorMode()
    replay, empty = Replay(mode), torch.ops.aten.empty.memory_format

    def made() -> Any:
        return replay(empty, ([13],), {})

    with mode:
        assert made().dtype is torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert made().dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_rows_that_numbers_choose_are_remembered_and_those_of_a_mask_are_not():
    mode = FakeTensorMode()
    seen: list[str] = []

    class Counted(Replay):
        def _made(self, *args: Any) -> Any:
            seen.append("from memory")
            return super()._made(*args)

    replay, index = Counted(mode), torch.ops.aten.index.Tensor

    def chosen(x: torch.Tensor, places: torch.Tensor) -> Any:
        return replay(index, (x, [places]), {})

    with mode:
        x, rows, mask = torch.empty(5, 7), torch.empty(3, dtype=torch.long), torch.empty(5, dtype=torch.bool)
        for _ in range(2):
            assert chosen(x, rows).shape == (3, 7)
        assert seen == ["from memory"]
        for _ in range(2):
            with pytest.raises(DynamicOutputShapeException):
                chosen(x, mask)
