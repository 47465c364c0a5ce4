#!/usr/bin/env bash
# Library: datasets==5.2.0
# Version: JSON builder, with pyarrow as resolved
# Guess: a JSON string is loaded as a string
# Seen: a column whose strings all look like dates ("2020-01-01", "2019-03-01 10:00:00") becomes a timestamp: answers of a
#   date task are datetime objects, and writing them back gives another text
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0
cd "$folder"
export HF_HOME="$folder/hf" HF_HUB_OFFLINE=1
"$folder/venv/bin/python" - <<'E'
import json

import datasets

rows = [{"question": "When?", "answer": "2020-01-01"}, {"question": "And then?", "answer": "2019-03-01 10:00:00"}]
open("rows.jsonl", "w").write("".join(json.dumps(row) + "\n" for row in rows))
loaded = datasets.load_dataset("json", data_files="rows.jsonl", split="train")
print(loaded.features["answer"], [str(row["answer"]) for row in loaded])
assert [type(row["answer"]).__name__ for row in loaded] == ["datetime", "datetime"]
assert str(loaded[0]["answer"]) != rows[0]["answer"]
E
