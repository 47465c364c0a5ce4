"""Where the parts of moegrid lie, and how a process finds them.

`jobs` and `orchestrator` are common names, so an installed distribution keeps them out of site-packages: they lie in
`moegrid/_parts` together with grids, sites and labs, in the layout of the repository. In a clone the parts are the
repository itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

_PACKED = Path(__file__).resolve().parent / "_parts"
HOME = _PACKED if _PACKED.is_dir() else Path(__file__).resolve().parents[3]


def enter(*, first: bool = False) -> None:
    """Make this distribution's `orchestrator` importable; with `first` its names go before all others.

    A process of the command line is ours alone (`first`); in a user's own process a `jobs` of theirs stays theirs.
    Raises ImportError when another package named `orchestrator` is found before ours.
    """
    if str(HOME) not in sys.path:
        sys.path.insert(0 if first else len(sys.path), str(HOME))
    import orchestrator

    found = Path(str(orchestrator.__file__)).resolve().parent
    if found != HOME / "orchestrator":
        raise ImportError(
            f"another package named orchestrator comes first on the path, from {found}: "
            "read the store in a process without it"
        )
