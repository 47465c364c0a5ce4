"""The init stage: the weights that a model starts from: at random by seed, imported, or upcycled."""

from __future__ import annotations

import logging
from dataclasses import replace

from jobs.data.pretrained import differing, own_tokenizer
from jobs.data.tokenizer import Vocabulary
from jobs.models.shards import Rows, digest_text, fetch_shards
from jobs.models.tensor_file import TensorFile
from jobs.models.upcycle import carried_weights, initial_weights, said_of_start
from jobs.models.weights import canonical_state, merged
from jobs.node.context import StageContext
from jobs.train.kept import Described, described, to_json
from jobs.train.randomness import reseed
from jobs.train.session import vocabulary_size
from orchestrator.data.tokenizers import foreign_hint
from orchestrator.errors import MoegridError
from orchestrator.spec.work import InitWork
from orchestrator.store.manifest import TENSORS, WEIGHTS

log = logging.getLogger(__name__)


def run(context: StageContext, work: InitWork) -> None:
    """Build the model and commit its weights."""
    require_own_tokenizer(context, work)
    size, rows = vocabulary_size(context, work.tokenizer), work.model.vocab_size
    if rows and rows < size:
        raise MoegridError(
            f"the model has {rows} token ids, its tokenizer {size}",
            hint=f"set model.vocab_size to {size} or more, or 0",
        )
    reseed(work.seed, "init")
    if work.state:
        # The same job may have trained the state, which is committed in the background.
        if (writer := context.job.live.get("writer")) is not None:
            writer.wait()
        state = merged(fetch_shards(context, work.state, "weights"))
        model, weights = carried_weights(work.model, rows or size, state, work.seed)
    else:
        model, weights = initial_weights(work.model, size, work.seed)
    path = context.scratch / "weights.safetensors"
    record: dict[str, Described] = {}
    with TensorFile(path, canonical_state(model)) as file:
        for name, tensor in weights:
            file.put(name, tensor)
            record.update(described({name: Rows.whole(tensor)}))
    tensors = to_json({name: replace(one, state=work.key()) for name, one in record.items()})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    info: dict[str, object] = {WEIGHTS: digest_text(one.digest for one in record.values()), "parameters": parameters}
    if work.model.upcycle and not work.state:
        info["upcycled"] = said_of_start(work.model)
        log.info("%s: upcycled; against the dense model: %s", context.label, info["upcycled"])
    context.commit(work, blobs={path.name: path, TENSORS: tensors.encode()}, info=info)


def require_own_tokenizer(context: StageContext, work: InitWork) -> None:
    """Raise MoegridError when the tokenizer is not the checkpoint's own: other ids mean nothing to its weights."""
    checkpoint = work.model.checkpoint
    if not checkpoint or work.model.foreign_tokenizer:
        return
    spec = context.manifest(work.tokenizer).spec.get("tokenizer", {})
    source = spec.get("source") or f"of kind {spec.get('kind')!r}"
    if source == checkpoint and not source.startswith("file://"):
        return
    own = own_tokenizer(checkpoint)
    differs = differing(Vocabulary.load(context.directory(work.tokenizer)).tokenizer, own) if own else ""
    if differs:
        raise MoegridError(
            f"tokenizer {source} is not that of checkpoint {checkpoint}", cause=differs, hint=foreign_hint(checkpoint)
        )
