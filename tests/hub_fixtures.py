"""Made-up rows in the layouts of the hub sets that the project names: the files, cards and columns they have there."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = Mapping[str, Any]

PAIR = {"premise": "A man eats.", "hypothesis": "A man is there.", "label": 0}
GLUE = {
    "sst2": {"sentence": "a made-up film", "label": 1, "idx": 0},
    "qqp": {"question1": "Why?", "question2": "How come?", "label": 1, "idx": 0},
    "mnli": {**PAIR, "idx": 0},
    "qnli": {"question": "Who?", "sentence": "It was made up.", "label": 0, "idx": 0},
    "rte": {"sentence1": "A made-up text.", "sentence2": "A text.", "label": 0, "idx": 0},
}
TARGETS = {"choices": ["yes", "no"], "labels": [1, 0]}
CONVERSATIONS = [["Made-up question one?", "Made-up answer one."], ["Two?", "It is two.", "And?", "No more."]]


def parquet(*rows: Row) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), sink)
    return sink.getvalue()


def lines(*rows: Row) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def card(configs: Mapping[str, Mapping[str, str]]) -> bytes:
    """Return a data card that declares configurations: name -> split -> path."""
    declared = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in configs.items()
    ]
    return f"---\nconfigs: {json.dumps(declared)}\n---\n# A card\n".encode()


def declared(configs: Mapping[str, Mapping[str, Sequence[Row]]]) -> dict[str, bytes]:
    """Return a repository of Parquet files whose card declares its configurations: name -> split -> rows."""
    files = {
        f"{name}/{split}-00000-of-00001.parquet": parquet(*rows)
        for name, splits in configs.items()
        for split, rows in splits.items()
    }
    patterns = {name: {split: f"{name}/{split}-*" for split in splits} for name, splits in configs.items()}
    return {"README.md": card(patterns), ".gitattributes": b"", **files}


def by_config(rows: Mapping[str, Row], split: str) -> dict[str, bytes]:
    return declared({name: {split: [row]} for name, row in rows.items()})


def _glue() -> dict[str, bytes]:
    splits = {name: {"validation": [row]} for name, row in GLUE.items()}
    matched = {f"validation_{kind}": [GLUE["mnli"]] for kind in ("matched", "mismatched")}
    return declared(splits | {"mnli": matched, "mnli_mismatched": {"validation": [GLUE["mnli"]]}})


def _lima() -> dict[str, bytes]:
    train = lines(*({"conversations": turns, "source": "made-up"} for turns in CONVERSATIONS))
    test = lines({"conversations": ["A prompt alone?"], "source": "made-up"})
    script = b"raise SystemExit('a loading script was run')\n"
    return {"README.md": b"---\nlicense: other\n---\n", "lima.py": script, "train.jsonl": train, "test.jsonl": test}


_SLIM = {"text": "A made-up text.", "meta": {"redpajama_set_name": "RedPajamaC4"}}
FILES: dict[str, dict[str, bytes]] = {
    "DKYoon/SlimPajama-6B": declared({"default": {split: [_SLIM] for split in ("train", "validation", "test")}}),
    # Its card declares no configuration; the published files are packed by zstd.
    "cerebras/SlimPajama-627B": {
        f"train/chunk{number}/example_train_0.jsonl": lines({**_SLIM, "text": f"Part {number}."}) for number in (1, 2)
    },
    "nyu-mll/blimp": by_config(
        {
            name: {"sentence_good": f"It is {name}.", "sentence_bad": "It are.", "UID": name}
            for name in ("adjunct_island", "wh_island")
        },
        "train",
    ),
    # Its card declares no configuration.
    "JeanKaddour/minipile": {
        "README.md": b"---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n---\n",
        **{
            f"data/{split}-00000-of-00001-a1.parquet": parquet({"text": f"a {split} text"})
            for split in ("train", "test")
        },
        "data/validation-00000-of-00001-a1.parquet": parquet({"text": "a validation text"}),
    },
    "GAIR/lima": _lima(),
    "walledai/XSTest": {
        "README.md": card({"default": {"test": "data/train-*"}}),
        "data/train-00000-of-00001.parquet": parquet(
            {"prompt": "How do I stop a process?", "focus": "", "type": "homonyms", "note": "", "label": "safe"},
        ),
    },
    "google-research-datasets/nq_open": declared(
        {"nq_open": {"validation": [{"question": "who made it up", "answer": ["me", "I"]}]}}
    ),
    "openai/gsm8k": declared(
        {"main": {s: [{"question": "One and one?", "answer": "1+1=2\n#### 2"}] for s in ("train", "test")}}
    ),
    "truthfulqa/truthful_qa": declared(
        {
            "generation": {"validation": [{"question": "Why?", "best_answer": "So."}]},
            "multiple_choice": {"validation": [{"question": "Why?", "mc1_targets": TARGETS, "mc2_targets": TARGETS}]},
        }
    ),
    "AI-Secure/adv_glue": by_config(
        {f"adv_{name}": row for name, row in GLUE.items()} | {"adv_mnli_mismatched": GLUE["mnli"]}, "validation"
    ),
    "nyu-mll/glue": _glue(),
    "tatsu-lab/alpaca": declared(
        {"default": {"train": [{"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Add."}]}}
    ),
    "facebook/anli": declared(
        {
            "plain_text": {
                f"{part}_r{number}": [{"uid": "u", **PAIR, "reason": ""}]
                for part in ("test", "train")
                for number in (1, 2, 3)
            }
        }
    ),
    "stanfordnlp/snli": declared({"plain_text": {"test": [PAIR, {**PAIR, "label": -1}], "train": [PAIR]}}),
    # A script and one file: the configuration is in the file's name.
    "EleutherAI/race": {
        "README.md": b"# Race\n",
        "race.py": b"raise SystemExit('a loading script was run')\n",
        "race_high_test.jsonl": lines(
            {
                "article": "A made-up story.",
                "problems": "[{'question': 'Q?', 'options': ['a', 'b', 'c', 'd'], 'answer': 'A'}]",
            }
        ),
    },
    "cam-cst/cbt": by_config(
        {
            name: {"sentences": ["Once."], "question": "XXXXX went .", "answer": "fox", "options": ["fox", "hen"]}
            for name in ("CN", "NE")
        },
        "test",
    ),
}
