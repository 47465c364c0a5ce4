"""SmolLM2-135M of the pinned wheel through the evaluation: accuracies, and the same of its upcycled copy at step 0.

    python benchmarks/pretrained.py              # 100 items a task, about 4 minutes on 2 cores
    python benchmarks/pretrained.py --items 20 --tasks arc_easy

The upcycled model's experts are copies of the dense feed-forward, so its scores are those of the dense model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from jobs.data.item_files import item_blobs
from jobs.data.pretrained import pretrained
from jobs.data.tokenizer import transformers_tokenizer
from jobs.evaluate.chunks import chunks, outcomes
from jobs.evaluate.harness import Prepared
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.results import Scored
from jobs.models.upcycle import initial_model
from orchestrator.grid.load import load_grid
from orchestrator.spec.cell import DataSpec, TaskSpec

WINDOW = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100, help="items of each task")
    parser.add_argument("--tasks", nargs="*", default=["arc_easy", "piqa", "sciq"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cells = [item.cell for item in load_grid("upcycle_smollm2").cells]
    dense = next(cell for cell in cells if cell.model.moe.preset == "dense")
    copied = next(cell for cell in cells if cell.model.upcycle == "copy")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        for name, content in item_blobs(DataSpec(source=dense.evaluate.source), tuple(options.tasks))[0].items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        tokenizer, special = pretrained(dense.tokenizer)
        (directory / "tokenizer.json").write_text(tokenizer.to_str())
        (directory / "special.json").write_text(json.dumps(special))
        tokenizer = transformers_tokenizer(directory)
        rows: dict[str, list[Scored]] = {}
        for name, cell in (("dense", dense), ("upcycled", copied)):
            lm = PrefixLM(initial_model(cell.model, len(tokenizer)), tokenizer, max_length=WINDOW)
            tasks = [
                Prepared(
                    TaskSpec(task),
                    directory,
                    limit=options.items,
                    seed=1234,
                    shared=False,
                    max_length=WINDOW,
                    encode=lm.encode,
                )
                for task in options.tasks
            ]
            started = time.process_time()
            parts = [chunk for task in tasks for chunk in chunks(task)]
            rows[name] = [row for chunk in parts for row in outcomes(chunk, chunk.answers(lm))]
            print(f"{name}: {time.process_time() - started:.0f} s CPU, {lm.computed_tokens:,} tokens", flush=True)
            for task in tasks:
                values = np.array([row.outcome.acc for row in rows[name] if row.task == task.name])
                error = math.sqrt(values.var(ddof=1) / len(values))
                print(f"  {task.name:10} acc {values.mean():.3f} ± {error:.3f}  chance {task.chance:.2f}", flush=True)
    pairs = list(zip(rows["dense"], rows["upcycled"], strict=True))
    largest = max(abs(a - b) for d, u in pairs for a, b in zip(d.outcome.scores, u.outcome.scores, strict=True))
    same = all(d.outcome.acc == u.outcome.acc for d, u in pairs)
    print(
        f"upcycled at step 0: accuracies of items {'identical' if same else 'DIFFER'}, largest difference {largest:.1e}"
    )


if __name__ == "__main__":
    main()
