"""Answer what `moegrid simulate` asks: `python -m jobs.simulate.run < questions > answers`, a JSON document a line."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping

from jobs.simulate.answer import Answer
from jobs.simulate.evaluation import Evaluation, Start, simulate_evaluation, simulate_start
from jobs.simulate.training import Training, simulate_training
from orchestrator.errors import MoegridError
from orchestrator.spec.rebuilding import build


def answered(question: Mapping[str, object]) -> dict[str, object]:
    """Return the answer to one question (of `orchestrator.plan.shapes`), or {"failed": why there is none}."""
    fields = dict(question)
    kind = str(fields.pop("kind"))
    shapes: dict[str, tuple[type, Callable[..., Answer]]] = {
        "training": (Training, simulate_training),
        "evaluation": (Evaluation, simulate_evaluation),
        "start": (Start, simulate_start),
    }
    shape, simulate = shapes[kind]
    try:
        return simulate(build(shape, fields)).to_json()
    except MoegridError as error:
        return {"failed": f"{error.error}: {error.cause}" if error.cause else error.error}
    except Exception as error:  # of an engine or a package: the others are answered
        logging.getLogger(__name__).warning("no simulation of %s", kind, exc_info=error)
        return {"failed": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer the questions of stdin in their order."""
    warnings.filterwarnings("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        answers.write(json.dumps(answered(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
