"""moegrid from Python: `moegrid.open_store("runs").results("finetune_freeze")`.

Importing it costs nothing; what it names is loaded when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator import __version__
    from orchestrator.api import Results, open_store

__all__ = ["Results", "__version__", "open_store"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'moegrid' has no attribute {name!r}; it has {', '.join(__all__)}")
    from moegrid._home import enter

    enter()
    if name == "__version__":
        from orchestrator import __version__

        return __version__
    from orchestrator import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
