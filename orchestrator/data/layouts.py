"""How texts stand in the rows of a data set: columns, paths into nested columns, conversations.

The plan and the node read rows with this, so that both refuse the same ones.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from orchestrator.data.hub_sets import CONVERSATIONS, EXCHANGE
from orchestrator.errors import SourceError
from orchestrator.spec.cell import DataSpec

# Layouts that go by other names: what the two fields are to be set to.
_KNOWN = (
    (("instruction", "output"), "prompt_field: instruction, response_field: output"),
    (("question", "answer"), "prompt_field: question, response_field: answer"),
    (("prompt", "completion"), "prompt_field: prompt, response_field: completion"),
)


def field_text(row: Mapping[str, object], name: str, where: str) -> str:
    """Return the text at `name`, a column or a dotted path into nested columns (`conversations.0`).

    SourceError when the row has none there, or something else than text.
    """
    value: Any = row
    for part in name.split("."):
        try:
            value = value[int(part)] if isinstance(value, (list, tuple)) else value[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise SourceError(
                f"{where} has no column {name!r}",
                cause=f"its columns are {', '.join(map(str, row))}",
                hint=_fields_of(row),
            ) from None
    if not isinstance(value, str):
        hint = "write it as text, leave the row out, or name another"
        if isinstance(value, (list, dict)):
            hint = _fields_of(row)
        elif isinstance(value, datetime.date):
            hint = "its reader took texts for dates: fetch the data, and use file:// with JSON lines"
        raise SourceError(f"column {name!r} of {where} is {type(value).__name__}, not text", hint=hint)
    return value


def exchange(row: Mapping[str, object], data: DataSpec, where: str) -> tuple[str, str]:
    """Return the prompt and the response of an instruction row.

    Where the fields are `prompt` and `response`, a row without them that holds a list of texts in `conversations`
    (LIMA's layout) gives its first two turns; later turns are left out. SourceError when either is missing.
    """
    turns = first_turns(row, data)
    if turns is None:
        return field_text(row, data.prompt_field, where), field_text(row, data.response_field, where)
    if len(turns) < 2:
        raise SourceError(
            f"{where}: its conversation has {len(turns)} turn{'' if len(turns) == 1 else 's'}, and no response",
            hint="choose another split, or leave such rows out",
        )
    return turns[0], turns[1]


def first_turns(row: Mapping[str, object], data: DataSpec) -> list[str] | None:
    """Return the turns of a row in LIMA's layout, None when its prompt and response are columns."""
    turns = row.get(CONVERSATIONS)
    if (data.prompt_field, data.response_field) != EXCHANGE or set(EXCHANGE) & set(row):
        return None
    return turns if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns) else None


def _fields_of(row: Mapping[str, object]) -> str:
    """Return what to set, in view of the row's layout."""
    for columns, fields in _KNOWN:
        if set(columns) <= set(row):
            return f"set {fields}"
    for column, value in row.items():
        if isinstance(value, list) and len(value) > 1 and all(isinstance(turn, Mapping) for turn in value[:2]):
            text = next((name for name in ("content", "value", "text") if name in value[0]), "")
            if text:
                return f"set prompt_field: {column}.0.{text}, response_field: {column}.1.{text}"
    return "set text_field (or prompt_field and response_field) of the data spec"
