"""A process that reads from a hub as a job does: one JSON request a line on stdin, one JSON answer a line on stdout.

Where the hub is, whether it is used and what is in the cache is fixed when its libraries are imported, so that a test
cannot change it in its own process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from typing import Any

from jobs.data import hub
from jobs.node.failures import kind_of
from orchestrator.errors import MoegridError
from orchestrator.spec.cell import DataSpec, JudgeSpec, TokenizerSpec


def rows(**data: Any) -> Any:
    from jobs.data.stage import read_rows

    return [dataclasses.asdict(row) for row in read_rows(DataSpec(**data))] + [hub.read_at(data["source"])]


def items(tasks: list[str], **data: Any) -> Any:
    from jobs.data.item_files import item_blobs

    blobs, _ = item_blobs(DataSpec(**data), tasks)
    return {name: [json.loads(line) for line in blob.splitlines()] for name, blob in blobs.items()}


def tokenizer(source: str) -> Any:
    from jobs.data.pretrained import pretrained

    found, special = pretrained(TokenizerSpec(kind="pretrained", source=source))
    return {"vocabulary": found.get_vocab_size(), "special": special, **hub.read_at(source)}


def checkpoint(source: str) -> Any:
    from jobs.models.sources import open_checkpoint

    found = open_checkpoint(source)
    return {"config": found.config, "tensors": {name: found.read(name).tolist() for name in found.shapes}}


def judge(source: str, revision: str) -> Any:
    from jobs.evaluate.judging.judge_models import local_folder

    return sorted(path.name for path in local_folder(JudgeSpec("llama_guard", source, revision)).iterdir())


def token(value: str) -> None:
    """Sign in, as a job's environment would."""
    os.environ["HF_TOKEN"] = value


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    hub.BUSY_SECONDS, hub.AWAY_SECONDS = 4.0, 0.5
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(seconds / 50)  # pauses between tries, the libraries' too
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": globals()[request.pop("do")](**request)}
        except MoegridError as error:
            answer = {"error": error.error, "cause": error.cause, "hint": error.hint, "kind": kind_of(error)}
        except Exception as error:
            answer = {"crash": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
