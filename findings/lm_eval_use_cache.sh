#!/usr/bin/env bash
# Library: lm_eval==0.4.13
# Version: as released (the package is lm_eval)
# Guess: use_cache=PATH keeps the answers of each model apart
# Seen: an answer is known by its request alone. A second model with the same PATH is never asked and gets the first one's
#   scores, without a word
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check lm_eval==0.4.13
cd "$folder"
export HF_HOME="$folder/hf" LM_HARNESS_CACHE_PATH="$folder/requests" HF_HUB_OFFLINE=1
"$folder/venv/bin/python" - <<'E'
import json

from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager


class Model(LM):
    """Prefers the first choice, or the second."""

    def __init__(self, prefers: int) -> None:
        super().__init__()
        self.prefers, self.asked = prefers, []

    def loglikelihood(self, requests):
        self.asked += [request.args for request in requests]
        first = [request.args[1].strip() == "yes it is" for request in requests]
        return [(0.0 if yes == (self.prefers == 0) else -1.0, True) for yes in first]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


def items(word: str) -> None:
    rows = [{"question": f"{word} {number}?", "label": 0} for number in range(4)]
    open("items.jsonl", "w").write("".join(json.dumps(row) + "\n" for row in rows))


items("first")
open("mine.yaml", "w").write("""
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes it is", "not so"]
doc_to_target: label
num_fewshot: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
""")

manager = TaskManager(include_path=".", include_defaults=False)


def accuracy(model: Model, tasks=("mine",), **options) -> float:
    found = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)
    return found["results"]["mine"]["acc,none"]



right, wrong, alone = Model(0), Model(1), Model(1)
scores = accuracy(right, use_cache="answers"), accuracy(wrong, use_cache="answers"), accuracy(alone)
print(f"first model {scores[0]}, second {scores[1]} after {len(wrong.asked)} requests, without a cache {scores[2]}")
assert scores == (1.0, 1.0, 0.0)
assert not wrong.asked
E
