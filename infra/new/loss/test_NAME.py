"""The loss NAME: `python -m pytest test_NAME.py`."""

from pathlib import Path

import pytest
import torch
from moegrid.extend import code_of, load_plugin, routing_of

KIND = load_plugin(Path(__file__).with_name("NAME.py"))["loss NAME"]
loss = code_of(KIND)


def test_an_even_router_costs_nothing() -> None:
    assert loss(routing_of(torch.zeros(6, 4)), KIND.parameters()).item() == 0


def test_an_uneven_one_costs_and_is_pushed_back() -> None:
    logits = torch.zeros(6, 4)
    logits[:, 0] = 1
    logits.requires_grad_()
    value = loss(routing_of(logits), KIND.parameters())
    value.backward()
    assert value.item() > 0
    assert logits.grad is not None
    assert logits.grad[:, 0].min() > 0, "a step of descent lowers the favourite's logits"


def test_its_parameters_are_checked() -> None:
    with pytest.raises(ValueError, match="power"):
        KIND.parameters(power=0.5)
