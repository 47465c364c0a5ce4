"""Bounds and choices of every field of a cell, by dataclass and name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.catalog.backbones import BACKBONES
from orchestrator.catalog.engines import ENGINES, REFUSED
from orchestrator.catalog.judges import JUDGES
from orchestrator.catalog.losses import LOAD_VARIANTS
from orchestrator.catalog.optimizers import OPTIMIZERS
from orchestrator.catalog.routers import ROUTERS
from orchestrator.catalog.schedules import SCHEDULES
from orchestrator.catalog.suites import SUITES
from orchestrator.catalog.tasks import TASKS
from orchestrator.catalog.templates import TEMPLATES
from orchestrator.errors import MoegridError, did_you_mean
from orchestrator.files.problems import Mistake
from orchestrator.registry import Registry
from orchestrator.spec.model import CHOICES, NAMED, UPCYCLES


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value may be, beyond its type. `above` is an exclusive lower bound; `refused` says why of a near miss.

    `names` are those of a registry: ours, and those that an installed package or a plugin file provides.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[Any, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    names: Registry[Any] | None = None

    def check(self, value: Any) -> None:
        """Raise Mistake when `value` breaks the rule."""
        if value in self.refused:
            offered = self.names.names() if self.names is not None else self.choices
            raise Mistake(f"{value!r} is not offered: {self.refused[value]}", f"one of {', '.join(offered)}")
        if self.choices and value not in self.choices:
            raise Mistake(f"must be one of {', '.join(map(repr, self.choices))}, not {value!r}", self._near(value))
        if self.names is not None:
            self._named(self.names, value)
        if self.low is not None and value < self.low:
            raise Mistake(f"must be at least {self.low:g}, not {value:g}")
        if self.above is not None and value <= self.above:
            raise Mistake(f"must be above {self.above:g}, not {value:g}")
        if self.high is not None and value > self.high:
            raise Mistake(f"must be at most {self.high:g}, not {value:g}")

    def _named(self, names: Registry[Any], value: Any) -> None:
        try:
            found = names.find(value)
        except MoegridError as error:  # its package is broken, or two provide it
            raise Mistake(": ".join(filter(None, (error.error, error.cause))), error.hint) from error
        if found is None:
            raise Mistake(f"must be one of {', '.join(map(repr, names.names()))}, not {value!r}", names.near(value))

    def _near(self, value: object) -> str:
        hint = did_you_mean(value, self.choices)
        return hint if hint.startswith("did you mean") else ""


def one_of(*choices: str) -> Rule:
    return Rule(choices=choices)


POSITIVE = Rule(low=1)
NATURAL = Rule(low=0)
NOT_NEGATIVE = Rule(low=0)
ABOVE_ZERO = Rule(above=0)
FRACTION = Rule(low=0, high=1)

RULES: dict[str, dict[str, Rule]] = {
    "Seeds": {name: Rule(low=0, high=2**31 - 1) for name in ("data", "init", "pretrain", "finetune", "eval")},
    "DataSpec": {
        "format": one_of("text", "instruction", "chat"),
        "rows": NATURAL,
        "holdout": Rule(low=0, high=0.5),
        "template": Rule(names=TEMPLATES),
    },
    "MixSpec": {"rows": NATURAL},
    "CorpusSpec": {"rows": NATURAL},
    "TokenizerSpec": {"kind": one_of("bpe", "pretrained"), "vocab_size": Rule(low=256, high=1_000_000)},
    "BalanceSpec": {
        "aux_coef": NOT_NEGATIVE,
        "aux_variant": one_of(*LOAD_VARIANTS),
        "aux_group": one_of("batch", "sequence", "pooled"),
        "aux_scope": one_of("micro_batch", "global"),
        "z_coef": NOT_NEGATIVE,
        "bias_rate": NOT_NEGATIVE,
        "entropy_coef": NOT_NEGATIVE,
        "null_coef": NOT_NEGATIVE,
        "mutual_information_coef": NOT_NEGATIVE,
        "aux_schedule": Rule(names=SCHEDULES),
        "z_schedule": Rule(names=SCHEDULES),
    },
    "AdapterSpec": {"rank": NATURAL, "alpha": ABOVE_ZERO, "router": one_of("frozen", "trained")},
    "TrainSpec": {
        "steps": Rule(low=1, high=1e12),
        "micro_batch": POSITIVE,
        "accumulation": POSITIVE,
        "sequence_length": Rule(low=8),
        "lr": ABOVE_ZERO,
        "router_lr": NOT_NEGATIVE,
        "router_lr_ratio": NOT_NEGATIVE,
        "schedule": Rule(names=SCHEDULES),
        "warmup_ratio": FRACTION,
        "min_lr_ratio": FRACTION,
        "betas": Rule(low=0, high=0.999999),
        "eps": ABOVE_ZERO,
        "weight_decay": NOT_NEGATIVE,
        "clip": NOT_NEGATIVE,
        "precision": one_of("fp32", "bf16", "mixed"),
        "loss": one_of("all", "response"),
        "expert_dropout": Rule(low=0, high=0.9),
        "optimizer": Rule(names=OPTIMIZERS),
    },
    "TaskSpec": {
        "name": Rule(names=TASKS),
        "shots": Rule(low=0, high=100),
        "limit": NATURAL,
        "metric": one_of("acc", "acc_norm"),
    },
    "BenchmarkSpec": {"limit": NATURAL, "shots": Rule(low=0, high=100)},
    "GenerationSpec": {"new_tokens": POSITIVE, "temperature": Rule(low=0, high=10)},
    "JudgeSpec": {"name": Rule(names=JUDGES)},
    "EvaluateSpec": {
        "suites": Rule(names=SUITES),
        "at": Rule(above=0, high=1),
        "max_length": Rule(low=16),
        "shots": one_of("per_item", "shared"),
        "precision": one_of("fp32", "bf16"),
        "val_tokens": POSITIVE,
        "efficiency_limit": NATURAL,
        "routing_seeds": POSITIVE,
    },
    "Resources": {
        "nodes": POSITIVE,
        "processes": POSITIVE,
        "cores": POSITIVE,
        "gpus": NATURAL,
        "memory_gb": ABOVE_ZERO,
        "minutes": POSITIVE,
    },
    "Parallel": {"shard": NATURAL, "expert": POSITIVE},
    "Execution": {
        "engine": Rule(names=ENGINES, refused=REFUSED),
        "device": one_of("cpu", "cuda"),
        "checkpoint_steps": NATURAL,
        "checkpoint_seconds": NOT_NEGATIVE,
        "log_every": POSITIVE,
        "hang_seconds": NOT_NEGATIVE,
    },
    "MoESpec": {
        **{name: Rule(choices=values) for name, values in CHOICES.items()},
        **{name: Rule(names=registry) for name, registry in NAMED.items()},
        "preset": Rule(names=ROUTERS),
        "top_k": POSITIVE,
        "num_experts": POSITIVE,
        "expert_width": POSITIVE,
        "shared_experts": NATURAL,
        "collaboration_top": NATURAL,
        "zero_experts": NATURAL,
        "copy_experts": NATURAL,
        "constant_experts": NATURAL,
        "null_experts": NATURAL,
        "n_group": POSITIVE,
        "topk_group": POSITIVE,
        "threshold_decay": Rule(low=0, high=0.999999),
        "temperature": ABOVE_ZERO,
        "router_init_std": NOT_NEGATIVE,
    },
    "ModelSpec": {
        "backbone": one_of(*BACKBONES),
        "hidden_size": POSITIVE,
        "num_layers": POSITIVE,
        "num_heads": POSITIVE,
        "num_kv_heads": POSITIVE,
        "context": Rule(low=8),
        "vocab_size": NATURAL,
        "rope_theta": ABOVE_ZERO,
        "norm_eps": ABOVE_ZERO,
        "init_std": ABOVE_ZERO,
        "dense_layers": NATURAL,
        "dense_width": NATURAL,
        "upcycle": one_of(*UPCYCLES),
        "head_dim": NATURAL,
        "qk_norm": one_of("", "full", "head"),
        "attention_bias": one_of("", "qkv", "all"),
    },
}
STAGE_RESOURCES = ("pretrain", "finetune", "evaluate", "prepare")
