"""`python -m orchestrator.tracking --store URL --tracking-uri URI --grid NAME`: publish a grid while it runs."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from orchestrator.ending import ends_at_once, with_code
from orchestrator.errors import MoegridError
from orchestrator.store import Store
from orchestrator.tracking.service import INTERVAL_SECONDS, serve


def main() -> int:
    """Publish until SIGTERM; the last publication happens before the process ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--store", required=True)
    parser.add_argument("--tracking-uri", required=True)
    parser.add_argument("--grid", required=True, action="append")
    parser.add_argument("--interval", type=float, default=INTERVAL_SECONDS)
    parser.add_argument("--attachments", type=Path, default=None, metavar="FOLDER", help="FOLDER/GRID/... at the end")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        return serve(
            Store.open(arguments.store),
            arguments.grid,
            arguments.tracking_uri,
            interval=arguments.interval,
            attachments=arguments.attachments,
        )
    except MoegridError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    ends_at_once()
    sys.exit(with_code(main()))
