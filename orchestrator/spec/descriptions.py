"""What the fields of a cell mean: the line under each of them in its dataclass, for the schema and the reference."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Mapping
from functools import cache
from itertools import pairwise


@cache
def descriptions(owner: type) -> Mapping[str, str]:
    """Return field -> the docstring that follows it in the source of the dataclass `owner`, or of one it extends."""
    (body,) = ast.parse(inspect.getsource(owner)).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for base in owner.__bases__:
        found |= descriptions(base) if dataclasses.is_dataclass(base) else {}
    for field, text in pairwise(body.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found
