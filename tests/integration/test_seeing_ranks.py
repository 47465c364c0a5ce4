"""Models that see, on two ranks that share everything: a phase that never runs the encoder, and one that trains it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.spec.work import TrainWork
from tests.integration.test_training_ranks import losses, run
from tests.seeing import chain, prepare_pictures
from tests.training import run_chain, state_bits

SERIES = ("train/lm_loss", "train/aux_loss", "train/z_loss", "train/grad_norm", "train/tokens")


def test_sharded_models_that_see_learn_as_one_process_does_and_resume_bit_for_bit(tmp_path: Path) -> None:
    one, two = (prepare_pictures(str(tmp_path / name)) for name in ("one", "two"))
    works = chain(cuts={"instruct": [5]})
    run_chain(one, works)
    run_chain(two, works[:3], "begun-0")
    run(two, works[3:4], "align-0", "fsdp")
    run_chain(two, works[4:5], "experts-0")
    run(two, works[5:], "instruct-0", "fsdp")
    trained = [work for work in works if isinstance(work, TrainWork)]
    assert losses(two, trained, SERIES) == pytest.approx(losses(one, trained, SERIES), rel=1e-4)
    straight = state_bits(two, trained[-1].key())
    two.artifacts.discard(trained[-1].key())
    run(two, works[-1:], "instruct-1", "fsdp")
    assert state_bits(two, trained[-1].key()) == straight
