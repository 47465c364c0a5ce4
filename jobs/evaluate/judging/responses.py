"""Stage `generate`: a state's responses to the prompts of a benchmark, for any number of judges to score.

Decoding is greedy, or sampled with a seed of each prompt's own, so that a resumed stage gives the same texts.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from jobs.data.whole_tables import whole_rows
from jobs.evaluate.harness import Row, read_rows, splits_in
from jobs.evaluate.ledger import Ledger
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.state import load_state
from orchestrator.errors import SourceError
from orchestrator.spec.suites import contrasted_layers

if TYPE_CHECKING:
    from jobs.node.context import StageContext
    from orchestrator.spec.work import GenerateWork

# Texts generated and stored together.
GENERATED_ITEMS = 32
RESPONSES_BLOB = "responses.parquet"
_COLUMNS = ("task", "item", "label", "prompt", "response")


def run(context: StageContext, work: GenerateWork) -> None:
    """Generate a response to every prompt and commit `responses.parquet`; goes on where a killed run was."""
    directory = context.directory(work.items)
    prompts: list[Row] = []
    for task in work.tasks:
        splits_in(directory, task.name, "test")
        for number, row in enumerate(read_rows(directory, task.name, "test", task.limit)):
            if "prompt" not in row:
                raise SourceError(f"the items of {task.name!r} have no prompt", cause=f"they have {', '.join(row)}")
            asked = {"prompt": row["prompt"], "label": row.get("label", "")}
            prompts.append({"task": task.name, "item": str(number), **asked})
    state = load_state(context, work)
    layers = contrasted_layers(work.dola, work.model.num_layers, tied=work.model.tie_embeddings)
    lm = PrefixLM(state.model, state.tokenizer, max_length=work.max_length, spans=state.spans, dola=layers)
    ledger = Ledger(context)
    parts = [prompts[at : at + GENERATED_ITEMS] for at in range(0, len(prompts), GENERATED_ITEMS)]
    texts = ledger.scored(
        [(f"responses-{number}", partial(_responses, lm, part, work)) for number, part in enumerate(parts)],
        lambda done: context.progress(min(done * GENERATED_ITEMS, len(prompts)), len(prompts)),
    )
    flat = [text for part in texts for text in part]
    rows = [{**prompt, "response": text} for prompt, text in zip(prompts, flat, strict=True)]
    empty = sum(not row["response"].strip() for row in rows)
    info = {
        "responses": len(rows),
        "empty": empty,
        "generation": {"new_tokens": work.generation.new_tokens, "temperature": work.generation.temperature},
        "template": work.generation.template,
        "max_length": work.max_length,
        "precision": work.precision,
        "dola": list(layers),
        "seed": work.seed,
    }
    ledger.commit(work, blobs={RESPONSES_BLOB: responses_parquet(rows)}, metrics={}, info=info)


def _responses(lm: PrefixLM, prompts: Sequence[Row], work: GenerateWork) -> list[str]:
    settings: dict[str, object] = {"until": [], "max_gen_toks": work.generation.new_tokens}
    if work.generation.temperature:
        # The first prompt names the part: the same prompts get the same draws, wherever a run was cut.
        name = hashlib.sha256(f"{work.seed}/{prompts[0]['task']}/{prompts[0]['item']}".encode()).digest()
        seed = int.from_bytes(name[:4], "big")
        settings |= {"temperature": work.generation.temperature, "do_sample": True, "seed": seed}
    texts = [work.generation.template.replace("{prompt}", row["prompt"]) for row in prompts]
    return generated(lm, texts, settings)


def generated(lm: PrefixLM, contexts: Sequence[str], settings: Mapping[str, object]) -> list[str]:
    """Return what follows each context under lm-eval's generation settings."""
    return lm.generate_until([_request(context, settings) for context in contexts], disable_tqdm=True)


def _request(context: str, settings: Mapping[str, object]) -> Any:
    return SimpleNamespace(args=(context, dict(settings)))


def responses_parquet(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Return `responses.parquet`: task, item, label, prompt, response."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    table = pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in _COLUMNS})
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_responses(blob: bytes) -> list[Row]:
    """Return the rows of `responses.parquet`."""
    return [dict(row) for row in whole_rows(io.BytesIO(blob))]
