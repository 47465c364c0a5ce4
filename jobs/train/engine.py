"""What an engine is: who owns gradients and optimizer. Implementations: `jobs.train.engines`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

from torch import Tensor

from jobs.models.backbones import CausalLM
from jobs.models.shards import Rows, dealt, tensors_digest
from jobs.models.weights import canonical_state


class Engine(Protocol):
    """What the training loop asks of an engine."""

    model: CausalLM
    rank: int
    world_size: int
    lockstep: bool  # forward and backward passes are collective: every rank must run equally many
    loss_scale: float  # by which the losses' gradients are multiplied until they are summed over ranks

    def freeze(self, frozen: str) -> None:
        """Freeze the roles that the schedule's word names, train all others."""

    def set_lr(self, lr: float, router_lr: float) -> None:
        """Set the learning rates of the next step."""

    def assert_lr(self, lr: float, router_lr: float) -> None:
        """Raise NumericsError unless every group has its learning rate."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's share of the loss."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over ranks."""

    def gradient_norm(self) -> Tensor:
        """Sum gradients over ranks and return their norm over all trainable parameters."""

    def step(self, scale: float) -> None:
        """Multiply gradients by `scale`, update the trainable parameters and drop the gradients."""

    def drop_gradients(self) -> None:
        """Forget the gradients without a step."""

    def digest(self, names: Collection[str]) -> str:
        """Return the digest of the weights of these canonical names, the same on every rank (all ranks together)."""

    def weights(self) -> Iterator[tuple[str, Rows]]:
        """Yield the weights that this rank writes, by canonical name: the ranks' shares together are all of them.

        All ranks take them together; one is valid until the next is asked for.
        """

    def optimizer_tensors(self) -> Mapping[str, Rows]:
        """Return the optimizer tensors that this rank writes, as `<parameter>.<slot>`.

        They are whole, rows, or flat runs of elements (rows of a flat tensor): those of the ranks are the whole.
        """

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the optimizer tensors of all ranks."""


def replicated_digest(model: CausalLM, names: Collection[str]) -> str:
    """Return the digest of named weights that every rank holds: each proves its own."""
    state = canonical_state(model)
    return tensors_digest({name: state[name] for name in names})


def replicated_weights(engine: Engine) -> Iterator[tuple[str, Rows]]:
    """Yield this rank's share of weights that every rank holds."""
    for name, tensor in dealt(canonical_state(engine.model), engine.rank, engine.world_size).items():
        yield name, Rows.whole(tensor)
