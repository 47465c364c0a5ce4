"""What a source is to a cell: its content, wherever it lies."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from orchestrator.spec.cell import BenchmarkSpec, DataSpec, JudgeSpec, MixSpec, TaskSpec, TokenizerSpec
from orchestrator.spec.model import ModelSpec

_Modelled = TypeVar("_Modelled", bound=ModelSpec)


def anywhere_model(model: _Modelled) -> _Modelled:
    """Return `model` without its checkpoint's path: files are known by their content, wherever they lie."""
    if model.checkpoint.startswith("file://") and model.checkpoint_digest:
        return dataclasses.replace(model, checkpoint="file://")
    return model


def examples_of(mix: MixSpec) -> DataSpec:
    """Return the instruction data that examples are mixed in from."""
    return DataSpec(
        mix.source,
        format="instruction",
        prompt_field=mix.prompt_field,
        response_field=mix.response_field,
        revision=mix.revision,
        digest=mix.digest,
    )


Sourced = TypeVar("Sourced", DataSpec, MixSpec, BenchmarkSpec, JudgeSpec, TaskSpec, TokenizerSpec)


def anywhere(spec: Sourced) -> Sourced:
    """Return `spec` without its file's path: a file is known by its content, wherever it lies."""
    if spec.source.startswith("file://") and spec.digest:
        return dataclasses.replace(spec, source="file://")
    return spec
