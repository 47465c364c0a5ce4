"""The init stage: the weights that a model starts from: at random by seed, imported, or upcycled."""

from __future__ import annotations

from jobs.context import StageContext
from jobs.models.backbones import canonical_state, weights_sha256
from jobs.models.shards import write_tensors
from jobs.models.upcycle import initial_model
from jobs.train.randomness import reseed
from jobs.train.stage import vocabulary_size
from orchestrator.spec.work import InitWork


def run(context: StageContext, work: InitWork) -> None:
    """Build the model and commit its weights."""
    reseed(work.seed, "init")
    model = initial_model(work.model, vocabulary_size(context, work.tokenizer), work.seed)
    path = context.scratch / "weights.safetensors"
    write_tensors(canonical_state(model), path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    info = {"weights_sha256": weights_sha256(model), "parameters": parameters}
    context.commit(work, blobs={path.name: path}, info=info)
