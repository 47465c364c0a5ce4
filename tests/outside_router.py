"""A router of another package: noise on its logits, and a gate of its own; what the tests of strangers install."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.catalog.routers import ROUTERS
from tests.packages import found, install

DECLARED = """
from dataclasses import dataclass

from orchestrator.catalog.routers import RouterKind


@dataclass(frozen=True)
class Noise:
    noise: float = 1.0
    hidden: int = 4

    def __post_init__(self):
        if self.noise < 0:
            raise ValueError("noise is below 0")


def count(moe, hidden_size):
    width = dict(moe.parameters).get("hidden", 4)
    return width * hidden_size + moe.num_experts * width


def problems(moe):
    if moe.unit != "token":
        yield "unit", f"unit {moe.unit!r} with preset 'noisy': every token has noise of its own"


NOISY = RouterKind(
    "noisy",
    code="outside_router_code:Noisy",
    variants={"one": {"renormalise": False}, "sum": {"renormalise": True}},
    parameters=Noise,
    parameter_count=count,
    problems=problems,
)
FIELDS = RouterKind("fields", variants={"": {"score": "sigmoid"}})
"""
CODE = """
import torch
from torch import nn

from jobs.moe.routers import Router


class Noisy(Router):
    def build(self):
        self.down = nn.Parameter(torch.empty(self.settings.hidden, self.hidden_size))
        self.up = nn.Parameter(torch.empty(self.num_ids, self.settings.hidden))

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=self.moe.router_init_std)

    def logits(self, x_TD, context):
        logits = torch.tanh(x_TD @ self.down.float().t()) @ self.up.float().t()
        ids = torch.arange(self.num_ids, device=x_TD.device)
        return logits + self.settings.noise * torch.sin(ids + 7 * x_TD[:, :1])
"""


@contextmanager
def noisy_installed(site: Path, declared: str = DECLARED) -> Iterator[Path]:
    """Install the package that provides the presets `noisy` (code and two parameters) and `fields` (values alone)."""
    for name in ("noisy", "fields"):
        ROUTERS.outside.pop(name, None)
    for name in ("outside_router", "outside_router_code"):
        sys.modules.pop(name, None)
    entries = {"routers": {"noisy": "outside_router:NOISY", "fields": "outside_router:FIELDS"}}
    install(site, "outside_router", declared, entries)
    (site / "outside_router_code.py").write_text(CODE)
    with found(site, "outside_router", "outside_router_code"):
        yield site
