"""How texts stand in the rows of a data set: columns, paths into nested columns, conversations.

The plan and the node read rows with this, so that both refuse the same ones.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from orchestrator.catalog.labelled import LABELLED, UNLABELLED
from orchestrator.catalog.templates import TEMPLATES, Turn
from orchestrator.data.hub_sets import CONVERSATIONS, EXCHANGE
from orchestrator.data.rows import Row
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
    if data.task:
        return classified(row, data.task, where)
    turns = first_turns(row, data)
    if turns is None:
        return field_text(row, data.prompt_field, where), field_text(row, data.response_field, where)
    if len(turns) < 2:
        raise SourceError(
            f"{where}: its conversation has {len(turns)} turn{'' if len(turns) == 1 else 's'}, and no response",
            hint="choose another split, or leave such rows out",
        )
    return turns[0], turns[1]


def classified(row: Mapping[str, object], task: str, where: str) -> tuple[str, str]:
    """Return a row of a classification as prompt and answer. SourceError when a part or a known label is missing."""
    kind = LABELLED[task]
    parts: dict[str, str] = {}
    for part, names in kind.columns.items():
        column = next((name for name in names if name in row), "")
        if not column:
            raise _unlike(row, where, f"no column {names[0]!r}", task)
        parts[part] = field_text(row, column, where)
    label = label_of(row, task)
    if label not in kind.answers:
        raise _unlike(row, where, f"the label {label!r}", task)
    return kind.prompt.format_map(parts), kind.answers[label]


def labelled(rows: Iterable[tuple[str, Row]], data: DataSpec) -> Iterator[tuple[str, Row]]:
    """Yield rows but those of a classification on which nobody agreed: SNLI's "-"."""
    if not data.task:
        yield from rows
        return
    for where, row in rows:
        if label_of(row, data.task) not in UNLABELLED:
            yield where, row


def label_of(row: Mapping[str, object], task: str) -> str:
    """Return a row's label as text; a whole number that a reader took for a fraction is one again."""
    found = next((row[name] for name in LABELLED[task].label if name in row), None)
    return str(int(found) if isinstance(found, float) and found.is_integer() else found)


def _unlike(row: Mapping[str, object], where: str, what: str, task: str) -> SourceError:
    kind = LABELLED[task]
    wanted = "; ".join(" or ".join(names) for names in (*kind.columns.values(), kind.label))
    return SourceError(
        f"{where} has {what}, and data.task is {task!r}",
        cause=f"its columns are {', '.join(map(str, row))}",
        hint=f"it reads {wanted}; labels are {', '.join(kind.answers)}",
    )


def first_turns(row: Mapping[str, object], data: DataSpec) -> list[str] | None:
    """Return the turns of a row in LIMA's layout, None when its prompt and response are columns."""
    turns = row.get(CONVERSATIONS)
    if (data.prompt_field, data.response_field) != EXCHANGE or set(EXCHANGE) & set(row):
        return None
    return turns if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns) else None


# What the roles of a turn are called.
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_TURNS = ("messages", CONVERSATIONS)


def conversation(row: Mapping[str, object], data: DataSpec, where: str) -> tuple[str, ...]:
    """Return a row of chat data as pieces in the template: context, answer, context, answer, ...

    SourceError when it has no turns, a role that is none, or no answer.
    """
    turns = turns_of(row, data, where)
    if not any(role == "assistant" for role, _ in turns):
        raise SourceError(f"{where}: its conversation has no answer", hint="choose another split, or leave it out")
    return TEMPLATES.get(data.template).pieces(turns)


def turns_of(row: Mapping[str, object], data: DataSpec, where: str) -> list[Turn]:
    """Return the turns of a row: `messages` of role and content (or from and value), a list of texts that take turns
    (LIMA), Alpaca's instruction, input and output, or the columns of a prompt and a response.
    """
    column = data.turns_field or next((name for name in _TURNS if name in row), "")
    if column:
        turns = row.get(column)
        if not isinstance(turns, list | tuple):
            return _no_turns(row, where, f"column {column!r} is {type(turns).__name__}, no list of turns")
        return [_turn(turn, number, f"{where}, turn {number + 1}") for number, turn in enumerate(turns)]
    if "instruction" in row and "output" in row:
        asked = field_text(row, "instruction", where)
        more = field_text(row, "input", where) if row.get("input") else ""
        return [("user", f"{asked}\n{more}" if more else asked), ("assistant", field_text(row, "output", where))]
    if data.prompt_field in row and data.response_field in row:
        asked, answer = (field_text(row, name, where) for name in (data.prompt_field, data.response_field))
        return [("user", asked), ("assistant", answer)]
    return _no_turns(row, where, "it has none of the known layouts")


def _turn(turn: object, number: int, where: str) -> Turn:
    if isinstance(turn, str):
        return ("user", "assistant")[number % 2], turn
    if not isinstance(turn, Mapping):
        raise SourceError(f"{where} is {type(turn).__name__}", hint="write {role: user, content: ...}, or a text")
    said, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = _ROLES.get(str(said).lower())
    if role is None:
        raise SourceError(f"{where} has the role {said!r}", cause=f"roles are {', '.join(_ROLES)}", hint="rename it")
    if not isinstance(text, str):
        raise SourceError(f"{where} has no text", cause=f"it has {', '.join(map(str, turn))}", hint="give it a content")
    return role, text


def _no_turns(row: Mapping[str, object], where: str, cause: str) -> list[Turn]:
    raise SourceError(
        f"{where} is no conversation",
        cause=f"{cause}; its columns are {', '.join(map(str, row))}",
        hint="set data.turns_field to the column of its turns, or prompt_field and response_field",
    )


def _fields_of(row: Mapping[str, object]) -> str:
    """Return what to set, in view of the row's layout."""
    for columns, fields in _KNOWN:
        if set(columns) <= set(row):
            return f"set {fields}"
    for column, value in row.items():
        if isinstance(value, list) and len(value) > 1 and all(isinstance(turn, Mapping) for turn in value[:2]):
            text = next((name for name in ("content", "value", "text") if name in value[0]), "")
            if text:
                whole = "set format: chat for whole conversations"
                return f"{whole}, or prompt_field: {column}.0.{text}, response_field: {column}.1.{text}"
    return "set text_field (or prompt_field and response_field) of the data spec"
