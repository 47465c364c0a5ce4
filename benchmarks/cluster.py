"""Two thousand stages to their end on a cluster of this machine that is disturbed all the time.

    python benchmarks/cluster.py slurm [--nodes 64] [--cells 128]
    python benchmarks/cluster.py ray [--nodes 8] [--cells 128]

Brings the lab of infra/slurm or infra/ray up (root and its packages needed for SLURM), runs cells of 15 stages each
whose jobs sleep, preempts jobs and takes nodes away every few seconds, restarts the controller once and kills the
driver once. Prints how often the scheduler was asked in a tick at most, and what a tick cost in the first and in the
second half of the run; fails when a result is lost, differs from what it must be, or was made twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SECONDS = 3600.0


def main() -> None:
    """Bring a lab up, run, print, take it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scheduler", choices=("slurm", "ray"))
    parser.add_argument("--nodes", type=int, default=0, help="nodes (default: 64 of SLURM, 8 of Ray)")
    parser.add_argument("--cells", type=int, default=128, help="cells of 15 stages each")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="moegrid-cluster-"))
    if options.scheduler == "slurm":
        from tests.faults import many_slurm
        from tests.lab_slurm import lab_of

        nodes = options.nodes or 64
        with contextlib.contextmanager(lab_of)(many_slurm.shape(nodes)) as lab:
            seen = many_slurm.run(lab, folder, nodes=nodes, cells=options.cells, seconds=SECONDS)
    else:
        from tests.faults import many_ray
        from tests.lab_ray import lab_of as ray_lab_of

        nodes = options.nodes or 8
        with contextlib.contextmanager(ray_lab_of)(nodes, many_ray.CORES) as ray_lab:
            seen = many_ray.run(ray_lab, folder, nodes=nodes, cells=options.cells, seconds=SECONDS)
    print(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main()
