#!/usr/bin/env bash
# Library: datasets==5.2.0
# Version: with huggingface_hub as resolved, against a small server on loopback that serves two commits of one set
# Guess: load_dataset(name, revision=B) gives revision B, or an error when the hub cannot be reached
# Seen: when the hub cannot be reached it gives any revision that is in the cache, here A, also for a revision that never was;
#   only a line of the log tells. Results of a pinned revision may be those of another one
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0
cd "$folder"
cat >hub.py <<'E'
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMITS = {"a" * 40: b'{"text": "old"}\n', "b" * 40: b'{"text": "new"}\n'}
FILE = "train.jsonl"


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        commit = next((commit for commit in COMMITS if commit in self.path), "")
        headers, status, body = {"X-Repo-Commit": commit}, 404, b"{}"
        if re.search(f"/resolve/{commit}/{FILE}$", self.path) and commit:
            status, body = 200, COMMITS[commit]
            headers["ETag"] = f'"{commit}"'
        elif "/resolve/" in self.path:
            headers["X-Error-Code"] = "EntryNotFound"
        elif "/tree/" in self.path or "/paths-info/" in self.path:
            entry = {"type": "file", "path": FILE, "size": len(COMMITS[commit]), "oid": commit}
            status, body = 200, json.dumps([entry]).encode()
        elif "/api/datasets/" in self.path:
            about = {"id": "made/up", "sha": commit, "private": False, "gated": False, "siblings": [{"rfilename": FILE}]}
            status, body = 200, json.dumps({**about, "tags": [], "downloads": 0, "likes": 0}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    do_HEAD = do_GET


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
open("port", "w").write(str(server.server_address[1]))
server.serve_forever()
E
"$folder/venv/bin/python" hub.py &
server=$!
trap 'kill $server 2>/dev/null || true; rm -rf "$folder"' EXIT
while [ ! -s port ]; do sleep 0.1; done
export HF_ENDPOINT="http://127.0.0.1:$(cat port)" HF_HOME="$folder/hf"
ask() {
    "$folder/venv/bin/python" -c '
import sys

import datasets

print(datasets.load_dataset("made/up", revision=sys.argv[1], split="train")[0]["text"])' "$1" 2>>log | tail -n 1
}
a=$(printf 'a%.0s' {1..40})
b=$(printf 'b%.0s' {1..40})
with=$(ask "$a")
kill $server
without="$(ask "$b") $(ask v9)"
echo "with the hub, revision A: $with; without it, revision B and v9: $without"
[ "$with" = old ]
[ "$without" = "old old" ]
