"""Logits become scores a part at a time: as many rows at once as pay on a device, and the same bits however many."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jobs.evaluate import reduction
from jobs.evaluate.reduction import reduced, rows_at_once


@pytest.mark.parametrize("rows", [1, 3, 17, 40])
def test_scores_do_not_depend_on_how_many_rows_are_reduced_at_once(rows: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, 300, generator=generator)
    logits[7, 11] = logits[7, 200] = 9.0  # of equal ones the first is the greedy choice
    slot, target = np.arange(40).repeat(2)[:79], np.arange(79) * 3
    slot[14:16], target[14:16] = 7, (11, 200)
    values, greedy = reduced(logits.split(rows), slot, target)
    expected = logits.log_softmax(-1)[slot, target].numpy()
    np.testing.assert_allclose(values, expected, atol=2e-6)
    np.testing.assert_array_equal(greedy, logits.argmax(-1).numpy()[slot] == target)
    assert greedy[14], "the first of two equal ones"
    assert not greedy[15], "the second of two equal ones"
    assert np.array_equal(values, reduced([logits], slot, target)[0])


def test_an_accelerator_reduces_a_vocabulary_of_50_thousand_by_the_thousand_rows() -> None:
    assert rows_at_once(50_280) == 5
    assert rows_at_once(50_280, "cuda") > 1000
    assert rows_at_once(50_280, "xpu") == rows_at_once(50_280, "cuda")
    assert rows_at_once(2 * reduction.LOGITS_AT_ONCE["cuda"], "cuda") == 1
