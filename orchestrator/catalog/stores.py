"""Stores: where artifacts, claims and documents lie, by the scheme of `--store`; a plain path is a folder.

The code is a function `open(url, patience, prepare) -> Objects` (`orchestrator.store.objects` has the operations and
what they promise). `patience`: seconds to retry a store that is away before StoreError; without `prepare` nothing may
be made, what is not there reads as empty. The objects' `url` opens them again from any folder, on nodes too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.registry import Registry


@dataclass(frozen=True, slots=True)
class StoreKind:
    """One kind of store: its scheme, and the dotted path of the function that opens one."""

    name: str
    code: str


BUILTINS: Mapping[str, StoreKind] = MappingProxyType(
    {
        "file": StoreKind("file", "orchestrator.store.local:open_folder"),
        "memory": StoreKind("memory", "orchestrator.store.bucket:open_bucket"),
        "s3": StoreKind("s3", "orchestrator.store.bucket:open_bucket"),
    }
)
STORES = Registry(
    "stores", "store", StoreKind, BUILTINS, "", "a node opens the store before it has anything that a grid brings"
)
