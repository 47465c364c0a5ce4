"""What a source is to a cell: its content, wherever it lies."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from orchestrator.spec.cell import BenchmarkSpec, CorpusSpec, DataSpec, JudgeSpec, MixSpec, TaskSpec, TokenizerSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.vision import EncoderSpec

_Modelled = TypeVar("_Modelled", bound=ModelSpec)


def anywhere_model(model: _Modelled) -> _Modelled:
    """Return `model` without its checkpoints' paths: files are known by their content, wherever they lie."""
    if model.vision is not None and anywhere_encoder(model.vision) is not model.vision:
        model = dataclasses.replace(model, vision=anywhere_encoder(model.vision))
    if model.checkpoint.startswith("file://") and model.checkpoint_digest:
        return dataclasses.replace(model, checkpoint="file://")
    return model


_Encoder = TypeVar("_Encoder", bound=EncoderSpec)


def anywhere_encoder(encoder: _Encoder) -> _Encoder:
    """Return `encoder` without its checkpoint's path, as a model's."""
    if encoder.checkpoint.startswith("file://") and encoder.checkpoint_digest:
        return dataclasses.replace(encoder, checkpoint="file://")
    return encoder


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


Sourced = TypeVar("Sourced", CorpusSpec, DataSpec, MixSpec, BenchmarkSpec, JudgeSpec, TaskSpec, TokenizerSpec)


def anywhere(spec: Sourced) -> Sourced:
    """Return `spec` without its file's path: a file is known by its content, wherever it lies."""
    if spec.source.startswith("file://") and spec.digest:
        return dataclasses.replace(spec, source="file://")
    return spec


def corpus_data(data: DataSpec, corpus: CorpusSpec) -> DataSpec:
    """Return one corpus of a mixture as data of its own."""
    return DataSpec(
        corpus.source,
        format=data.format,
        split=corpus.split,
        text_field=corpus.text_field,
        prompt_field=corpus.prompt_field,
        response_field=corpus.response_field,
        rows=corpus.rows,
        holdout=data.holdout,
        template=data.template,
        task=data.task,
        turns_field=data.turns_field,
        images_field=data.images_field,
        revision=corpus.revision,
        digest=corpus.digest,
    )


def anywhere_data(data: DataSpec) -> DataSpec:
    """Return training data with every file known by its content: its own, what is mixed in, its corpora."""
    corpora = tuple(map(anywhere, data.corpora))
    return dataclasses.replace(anywhere(data), mix=anywhere(data.mix), corpora=corpora)
