#!/usr/bin/env bash
# Library: lmms-eval==0.7.3
# Version: its wheel without what it depends on, loguru==0.7.3; the task's own module alone is imported
# Guess: ocrbench_aggregate_accuracy(results, args) is the accuracy of these results
# Seen: it counts into a table of the module, so that a second model in one process is given the first one's right answers too
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps lmms-eval==0.7.3 loguru==0.7.3
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'E2'
import sys
import types
from importlib.util import find_spec
from pathlib import Path

from_wheel = Path(next(iter(find_spec("lmms_eval").submodule_search_locations)))
for name in ("lmms_eval", "lmms_eval.tasks"):  # their own start-up code needs torch and more
    package = types.ModuleType(name)
    package.__path__ = [str(from_wheel.joinpath(*name.split(".")[1:]))]
    sys.modules[name] = package
from lmms_eval.tasks.ocrbench.utils import ocrbench_aggregate_accuracy, ocrbench_process_results

doc = {"answer": ["STOP"], "dataset": "x", "question_type": "Regular Text Recognition"}
args = types.SimpleNamespace(output_path=".")


def score(answers):
    results = [ocrbench_process_results(doc, [answer])["ocrbench_accuracy"] for answer in answers]
    return ocrbench_aggregate_accuracy(results, args)


right, wrong = score(["stop", "stop"]), score(["go", "go"])
print(f"two right answers: {right}; then, of another model, two wrong ones: {wrong}")
sys.exit(0 if right == wrong == 2 / 1000 else 1)
E2
