"""Parquet files that are read whole."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from orchestrator.data.rows import Row


def whole_rows(source: Path | BinaryIO, *columns: str) -> list[Row]:
    """Return the rows of a Parquet file with these columns, or with all.

    Without threads: pyarrow's may still be starting when a short process ends, which is then aborted (25.0.1).
    """
    import pyarrow.parquet as pq

    rows: list[Row] = pq.read_table(source, columns=list(columns) or None, use_threads=False).to_pylist()
    return rows
