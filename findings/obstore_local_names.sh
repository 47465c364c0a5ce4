#!/usr/bin/env bash
# Library: obstore==0.12.1
# Version: LocalStore, Linux
# Guess: a file of any name that lies in the folder is listed, and a key that a bucket takes is taken here
# Seen: a name that ends in # and a number ("x#2", as spool and backup programs write) is refused as a key, and a file of that
#   name is left out of every listing, without a word: what counts or deletes by a listing does not see it
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check obstore==0.12.1
cd "$folder"
"$folder/venv/bin/python" - <<'E'
from pathlib import Path

import obstore
from obstore.store import LocalStore, MemoryStore


def names(store):
    return [entry["path"] for chunk in obstore.list(store, prefix="runs") for entry in chunk]


folder = Path("store").resolve()
(folder / "runs").mkdir(parents=True)
for name in ("a", "x#2"):
    (folder / "runs" / name).write_bytes(b"1")
memory, local = MemoryStore(), LocalStore(folder)
obstore.put(memory, "runs/x#2", b"1")
print("in memory", names(memory), "on the disk", names(local))
assert names(memory) == ["runs/x#2"]
assert names(local) == ["runs/a"]
try:
    obstore.put(local, "runs/y#2", b"1")
    raise SystemExit("the key is taken now")
except Exception as error:
    print(str(error).splitlines()[0])
    assert "are not supported" in str(error)
E
