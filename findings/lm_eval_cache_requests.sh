#!/usr/bin/env bash
# Library: lm_eval==0.4.13
# Version: as released
# Guess: cache_requests=True builds the requests again when the task's items have changed
# Seen: they are known by the task's name, shots, template and tokenizer: after the items' file changed the old questions are
#   asked, without a word
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



asked = []
for word, cached in (("first", True), ("second", False), ("second", True)):
    items(word)
    model = Model(0)
    accuracy(model, cache_requests=cached)
    asked.append(model.asked[0][0])
print(asked)
assert asked == ["first 0?", "second 0?", "first 0?"]
E
