"""A committed training state as a folder that transformers loads: what `moegrid export` runs.

python -m jobs.models.export --store runs --state KEY FOLDER
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import MoegridError
from orchestrator.spec.work import TrainWork, work_from_json
from orchestrator.store import Manifest, Store


def export_state(store: Store, key: str, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer of the state `key` to `folder`.

    Raises MoegridError when there is no such state, or when no public architecture computes what its model does.
    """
    from jobs.data.tokenizer import save_tokenizer, transformers_tokenizer
    from jobs.models.building import empty_model
    from jobs.models.layouts import public_layout
    from jobs.models.public import export_checkpoint
    from jobs.models.shards import Shards, weight_names
    from jobs.models.weights import merged

    manifest = _manifest(store, key)
    work = work_from_json(manifest.spec)
    if not isinstance(work, TrainWork):
        raise MoegridError(f"artifact {key[:12]} is no training state but of kind {manifest.kind!r}")
    public_layout(work.model)  # said before gigabytes are read
    words = _manifest(store, work.tokenizer)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for blob in words.blobs:
            store.artifacts.fetch(words, blob.name, scratch)
        model = empty_model(work.model, int(words.info["vocab_size"]))
        groups = (
            [store.artifacts.fetch(manifest, name, scratch) for name in names] for names in weight_names(manifest)
        )
        tokenizer = transformers_tokenizer(scratch)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        special = {name: getattr(tokenizer, name) for name in names}
        export_checkpoint(model, folder, special, merged(Shards(*groups)))
        save_tokenizer(tokenizer, folder)


def _manifest(store: Store, key: str) -> Manifest:
    manifest = store.artifacts.get(key)
    if manifest is None:
        raise MoegridError(f"the store has no artifact {key[:12]}", hint="run the grid first")
    return manifest


def main(words: Sequence[str] | None = None) -> int:
    """Export one state; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--state", required=True, metavar="KEY")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(words)
    try:
        export_state(Store.open(arguments.store), arguments.state, arguments.folder)
    except MoegridError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
