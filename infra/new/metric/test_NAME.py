"""The metric NAME: `python -m pytest test_NAME.py`."""

from pathlib import Path

import torch
from moegrid.extend import code_of, load_plugin, routing_of

KIND = load_plugin(Path(__file__).with_name("NAME.py"))["metric NAME"]
metric = code_of(KIND)


def test_it_has_one_value_a_token_in_its_range() -> None:
    values = metric(routing_of(torch.randn(50, 4)), KIND.parameters())
    assert values.shape == (50,)
    assert values.min() >= KIND.low
    assert values.max() <= KIND.high


def test_an_even_router_is_never_sure_and_an_extreme_one_always() -> None:
    assert metric(routing_of(torch.zeros(6, 4)), KIND.parameters()).sum() == 0
    assert metric(routing_of(100 * torch.eye(4)), KIND.parameters()).mean() == 1


def test_its_parameter_moves_it() -> None:
    routing = routing_of(torch.tensor([[1.0, 0.0]]))
    assert metric(routing, KIND.parameters(threshold=0.7)).item() == 1
    assert metric(routing, KIND.parameters(threshold=0.8)).item() == 0
