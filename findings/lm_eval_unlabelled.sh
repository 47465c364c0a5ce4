#!/usr/bin/env bash
# Library: lm-eval==0.4.13
# Version of what it stands on: datasets==5.2.0.
# Guess: an item whose label is -1, as the hub writes a split without labels, is left out of the mean or told about, as an
#   item is whose label is too large ("Label index was not in within range of available choices").
# Seen: only the upper bound is looked at. A label of -1 stays -1, no choice is number -1, and the item counts as wrong
#   without a word: two items, one of them unlabelled, both answered as the labelled one says, give acc 1.0 and 0.0.
# Exits 0 while this is so, 1 when such an item is refused, left out or told about.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q lm-eval==0.4.13 datasets==5.2.0
cat > "$work/unlabelled.py" <<'PY'
import sys

import datasets
from lm_eval.api.task import ConfigurableTask

ROWS = [{"q": "sit", "a": "on a mat", "b": "no", "label": label} for label in (0, -1)]


class Task(ConfigurableTask):
    def download(self, *args, **kwargs):
        self.dataset = {"validation": datasets.Dataset.from_list(ROWS)}


task = Task(
    config={
        "task": "made",
        "dataset_path": "json",
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{[a, b]}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
)
found = [task.process_results(doc, [(-1.0, True), (-2.0, False)])["acc"] for doc in task.task_docs]
print("acc of a labelled and of an unlabelled item:", found)
sys.exit(found != [1.0, 0.0])
PY
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" "$work/unlabelled.py" > "$work/said.txt" 2>&1 && status=0 || status=1
tail -n 3 "$work/said.txt"
if grep -qi "not in within range" "$work/said.txt"; then status=1; fi
exit "$status"
