#!/usr/bin/env bash
# Libraries: submitit==1.5.4, absl-py==2.5.1
# Versions 1.5.4, 2.5.1
# Guess: `import submitit` adds a logger of its own, and leaves the handlers and streams of others alone.
# Seen: it calls logging.config.dictConfig, which shuts down every handler of the process, `disable_existing_loggers: False`
#   or not. absl's handler closes the stream it writes to then, unless that is sys.stderr or sys.stdout at that moment: a
#   stream that stood in for sys.stderr when absl was imported (a test runner's capture, a redirection) is closed, and
#   whoever made it gets "I/O operation on closed file". SUBMITIT_LOG_LEVEL=NOCONFIG before the import prevents it.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q submitit==1.5.4 absl-py==2.5.1
cat >"$folder/show.py" <<'P'
import contextlib
import io

stream = io.StringIO()
with contextlib.redirect_stderr(stream):
    import absl.logging  # noqa: F401
import submitit  # noqa: F401

print("closed" if stream.closed else "open")
P
test "$("$folder/venv/bin/python" "$folder/show.py")" = closed
test "$(SUBMITIT_LOG_LEVEL=NOCONFIG "$folder/venv/bin/python" "$folder/show.py")" = open
echo "as seen: the import closes a stream that is not its own"
