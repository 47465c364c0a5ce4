"""Writing files to begin from: all of them or, where one exists, none; nothing is overwritten."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.errors import MoegridError


def write_new(texts: Mapping[Path, str], command: str, hint: str) -> None:
    """Write files and print their paths; MoegridError, before anything is written, where one of them exists."""
    existing = [str(path) for path in texts if path.exists()]
    if existing:
        raise MoegridError(f"{existing[0]} exists already", cause=f"{command} overwrites nothing", hint=hint)
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise MoegridError(f"{path} cannot be written", cause=str(error), hint="name another folder") from error
        print(path)
