"""The command line: `moegrid COMMAND GRID ...`. Only argument parsing lives here; commands are imported when called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn

from orchestrator import __version__
from orchestrator.commands.examples import epilog
from orchestrator.errors import EXIT_DETACHED, EXIT_DONE, EXIT_FAILED, EXIT_USAGE, MoegridError

_EPILOG = """\
exit codes: 0 all done, 1 some cells failed, 2 usage or invalid grid, 3 store, tracker or scheduler unreachable,
4 `plan --exit-code` with changes pending, 130 stopped or detached

examples:
  moegrid run quickstart                                    the three-cell grid, in a few minutes
  moegrid plan finetune_freeze --only 'freeze=none->router' what one setting would cost
  moegrid run grids/mine.yaml factors.seed=[0,1]            with a factor replaced
  moegrid run finetune_freeze --site slurm --nodes 2 --processes 2
                                                            every training stage on 2 nodes x 2 processes
  moegrid explain 'quickstart:freeze=none->router'          why this cell is new, or what of it is done
  moegrid logs quickstart -f                                what the newest job says, as it grows
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors read like all the others: error, hint, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise MoegridError(message, hint=f"{self.prog} --help explains")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    everywhere = Parser(add_help=False)
    everywhere.add_argument("--store", help="folder or URL of the store (MOEGRID_STORE, else ./runs)")
    everywhere.add_argument("--tracking", help="MLflow URI, or none (MOEGRID_TRACKING, MLFLOW_TRACKING_URI)")
    everywhere.add_argument("--debug", action="store_true", help="show tracebacks")
    as_json = Parser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="write JSON to stdout")
    grid = Parser(add_help=False)
    _grid_arguments(grid)
    cells = Parser(add_help=False)
    _grid_arguments(cells, metavar="GRID[:CELL]")
    driving = Parser(add_help=False)
    _driving_arguments(driving)

    parser = Parser(
        prog="moegrid",
        description="Controlled experiments on Mixture-of-Experts language models: a YAML grid becomes a table.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moegrid {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, summary: str, *parents: Parser) -> argparse.ArgumentParser:
        one = commands.add_parser(
            name,
            help=summary,
            description=summary,
            parents=[*parents, everywhere],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        grids = next((a for a in one._actions if a.dest == "grid"), None)
        overrides = grids is not None and any(a.dest == "overrides" for a in one._actions)
        if overrides and grids is not None:
            word = f"[{grids.metavar}]" if grids.nargs == "?" else str(grids.metavar)
            rest = " FOLDER" if name == "export" else ""
            one.usage = f"moegrid {name} {word}{rest} [KEY=VALUE ...] [options]"
        one.epilog = epilog(name, overrides=overrides)
        return one

    one = add("plan", "show what a run would do, and what it costs", grid, as_json)
    one.add_argument("--exit-code", action="store_true", help="exit 4 when something is to do")
    _gpu_argument(one)
    one = add("simulate", "memory, communication and time of every stage on a GPU, without a GPU", grid, as_json)
    _gpu_argument(one)
    add("run", "bring a grid to its end: plan, train, evaluate, table", grid, driving)
    add("resume", "go on after an interruption or a failure (the same as run)", grid, driving)
    add("tick", "one step of a detached run, for cron or a login node", grid, driving)
    one = add("status", "state of every cell", grid, as_json)
    one.add_argument("--watch", action="store_true", help="again and again, with running jobs")
    one = add("logs", "log of the newest attempt at a grid's cell, stage or attempt", cells)
    one.add_argument("--rank", type=_natural, default=None, metavar="N", help="of this process of the job alone")
    one.add_argument("-f", "--follow", action="store_true", help="as it grows")
    add("explain", "why a cell is new: which field, old and new value", cells, as_json)
    one = add("diff", "fields in which two grids or cells differ", as_json)
    one.add_argument("a", metavar="A", help="GRID or GRID:CELL")
    one.add_argument("b", metavar="B", help="GRID or GRID:CELL")
    one.add_argument("--scale", default="tiny", help="of both: tiny, small, large or paper (tiny)")
    one = add("cancel", "ask running jobs to save their states and stop", grid)
    one.add_argument("--now", action="store_true", help="end jobs without a driver at once")
    one = add("report", "write the HTML, CSV and LaTeX report", grid, as_json)
    one.add_argument("--output", default="", metavar="FILE", help="where to write the page (reports/GRID/index.html)")
    one.add_argument("--open", action="store_true", help="show it in the browser")
    one = add("dashboard", "the report of a grid in the browser, made anew while it runs", grid)
    one.add_argument("--port", type=_natural, default=0, help="of the loopback interface (0: any that is free)")
    one.add_argument("--open", action="store_true", help="show it in the browser")
    one = add("table", "results, one row per setting and seed", grid, as_json)
    text = "terminal (four digits), csv, md (Markdown) or json (all digits); default: terminal on one, else md"
    one.add_argument("--format", default="", choices=("terminal", "csv", "md", "json"), help=text)
    one = add("export", "a cell's final model as a folder that transformers loads", cells)
    one.add_argument("folder", metavar="FOLDER", help="where config.json, model.safetensors and the tokenizer go")
    one = add("data", "the data sets that need no hub, or a page of examples of any", as_json)
    one.add_argument("action", choices=("list", "show"), help="list the sets, or show one")
    one.add_argument("source", nargs="?", default="", metavar="SET", help="of show: SCHEME://..., as a grid's source")
    text = "text, instruction, chat, vision or items; default: what a package's set is, else text"
    one.add_argument("--format", default="", help=text)
    one.add_argument("--revision", default="", help="of a hub:// set")
    one.add_argument("--rows", type=_positive, default=12, metavar="N", help="of each kind (12)")
    one.add_argument(
        "--seed", type=_natural, default=0, metavar="N", help="draws the rows, and makes the questions (0)"
    )
    one.add_argument("--task", action="append", default=[], metavar="TASK", help="of items: only this one")
    one.add_argument("--output", default="", metavar="FILE", help="where to write the page (reports/data/NAME.html)")
    one.add_argument("--open", action="store_true", help="show it in the browser")
    one = add("compare", "differences between two grids of the store, setting by setting", as_json)
    one.add_argument("a", metavar="GRID_A", help="a grid that was run in this store")
    one.add_argument("b", metavar="GRID_B", help="another one, or the same")
    text = "terminal (fits its width, the default), csv, md (Markdown) or tex (LaTeX)"
    one.add_argument("--format", default="terminal", choices=("terminal", "csv", "md", "tex"), help=text)
    one = add("effects", "what each factor does, over the cells of one or several grids of the store", as_json)
    one.add_argument("grids", metavar="GRID", nargs="+", help="grids that were run in this store, at one scale")
    one.add_argument("--metric", action="append", default=[], metavar="NAME", help="of these (the primary ones)")
    one.add_argument("--format", default="terminal", choices=("terminal", "csv", "md", "tex"), help=text)
    one = add("paper", "every table and figure of the papers: made from the store, or what is missing for it", as_json)
    one.add_argument("--output", default="reports/paper", metavar="FOLDER", help="where to write (reports/paper)")
    one.add_argument("--run", default="", metavar="SCALE", help="run the grids of what is missing first, at this scale")
    one = add("sync", "fill the tracker from the store", everywhere_grid(optional=True))
    one.add_argument("--follow", action="store_true", help="go on until interrupted")
    one = add("gc", "delete what no grid needs (only shows it unless --delete)", as_json)
    one.add_argument("--delete", action="store_true", help="really delete what was marked long enough ago")
    one.add_argument("--grace", type=_amount, default=7.0, metavar="DAYS", help="days between marking and deleting (7)")
    one = add("doctor", "check store, tracker, scheduler, wheels, disk, versions", as_json)
    one.add_argument("--site", default="local", help="a file of infra/sites, whose scheduler is looked at (local)")
    one = add("init", "write a grid and a Makefile to start from")
    one.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="where (the working directory)")
    one = add("new", "write a plugin of your own to start from, with its test")
    one.add_argument("kind", metavar="KIND", help="router, loss, metric, ...: what it declares")
    one.add_argument("name", metavar="NAME", help="what grids call it")
    one.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="where (the working directory)")
    add("schema", "write the JSON Schema of grid files to stdout")
    one = add("ui", "open the MLflow UI on this store's runs")
    one.add_argument("name", metavar="GRID", nargs="?", default="", help="whose cells are shown (all grids)")
    one.add_argument("--open", action="store_true", help="show them in the browser")
    one.add_argument("--port", type=int, default=5000, help="of the loopback interface (5000)")
    return parser


def everywhere_grid(*, optional: bool) -> Parser:
    """Return the grid arguments with an optional grid."""
    parser = Parser(add_help=False)
    _grid_arguments(parser, optional=optional)
    return parser


def _grid_arguments(parser: argparse.ArgumentParser, *, optional: bool = False, metavar: str = "GRID") -> None:
    of_cell = "; after a colon one cell: its name, or the beginning of its id" if ":" in metavar else ""
    parser.add_argument(
        "grid", metavar=metavar, nargs="?" if optional else None, help=f"a name in grids/, or a YAML file{of_cell}"
    )
    parser.add_argument("--scale", default="tiny", help="tiny, small, large or paper (tiny)")
    parser.add_argument("--site", default="local", help="a file of infra/sites: local, slurm, ray")
    parser.add_argument("--seeds", type=_seeds, default=None, metavar="0,1", help="values of the plain seed")
    parser.add_argument("--only", action="append", default=[], metavar="FACTOR=VALUE", help="only these cells")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="replace a value"
    )
    for name, what in (("nodes", "nodes"), ("processes", "processes on each node (ranks, one per GPU)")):
        text = f"{what} of every training stage; default: execution.resources of the grid"
        parser.add_argument(f"--{name}", type=_positive, default=None, metavar="N", help=text)
    parser.add_argument("--no-share", action="store_true", help="every cell trains alone: no shared prefixes")


def _driving_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--detach", action="store_true", help="submit what is ready and leave; go on with tick")
    parser.add_argument("--max-jobs", type=_natural, default=0, metavar="N", help="at most N jobs at a time")
    parser.add_argument(
        "--max-gpu-hours", type=_amount, default=None, metavar="H", help="refuse a plan that needs more"
    )
    parser.add_argument(
        "--max-core-hours", type=_amount, default=None, metavar="H", help="the same of a plan without GPUs"
    )
    parser.add_argument("--retry", choices=("outside", "all"), default="outside", help="which failures to try again")
    parser.add_argument("--allow-numerics", action="store_true", help="go on from states made under other numerics")
    parser.add_argument("--allow-code", action="store_true", help="go on from states made by other training code")
    parser.add_argument("--force-memory", action="store_true", help="run also what cannot fit its GPUs")
    _gpu_argument(parser)
    parser.add_argument("--no-report", action="store_true", help="do not write the HTML report at the end")
    parser.add_argument("--verify", action="store_true", help="read every blob of the grid before planning")


def _gpu_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", default="", metavar="NAME", help="what each process has: a100, h100, h200, b200, ...")


def _positive(text: str) -> int:
    if not _natural(text):
        raise argparse.ArgumentTypeError("it must be at least 1")
    return int(text)


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0,1,2") from None


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return number


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; KEY=VALUE words anywhere after the grid are overrides. Raises MoegridError."""
    parser = build_parser()
    names = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    first = next((word for word in words if not word.startswith("-")), "")
    if first and first not in names:
        from orchestrator.errors import nearest

        hint = nearest(first, names) or "moegrid --help lists the commands"
        raise MoegridError(f"unknown command {first!r}", hint=hint)
    arguments, rest = parser.parse_known_args(list(words))
    if not arguments.command:
        parser.print_help()
        raise SystemExit(EXIT_USAGE)
    extra = [word for word in rest if "=" in word and not word.startswith("-")]
    unknown = [word for word in rest if word not in extra]
    if unknown or (extra and not hasattr(arguments, "overrides")):
        from orchestrator.errors import nearest

        word = (unknown or extra)[0]
        actions = names[arguments.command]._actions
        options = [o for action in actions for o in action.option_strings if action.dest != "help"]
        hint = nearest(word.split("=")[0], options) or f"moegrid {arguments.command} --help explains"
        if word in unknown and "." in word and not word.startswith("-") and hasattr(arguments, "overrides"):
            hint = f"a value is replaced by {word}=VALUE"
        raise MoegridError(f"unknown argument {word!r}", hint=hint)
    if hasattr(arguments, "overrides"):
        arguments.overrides = [*arguments.overrides, *extra]
        arguments.written = list(arguments.overrides)
        arguments.overrides += _training_resources(arguments)
    return arguments


def _training_resources(arguments: argparse.Namespace) -> list[str]:
    """Return --nodes and --processes as settings of the phases that train."""
    from orchestrator.spec.rules import PHASES

    asked = {"nodes": arguments.nodes, "processes": arguments.processes}
    return [
        f"set.execution.resources.{phase}.{name}={value}" for phase in PHASES for name, value in asked.items() if value
    ]


def command_function(name: str) -> Callable[..., int]:
    """Return the function behind a command, importing its module."""
    if name in ("run", "resume"):
        from orchestrator.commands.run import run

        return run
    if name == "tick":
        from orchestrator.commands.run import tick

        return tick
    if name in ("plan", "simulate", "status", "logs", "cancel", "dashboard", "paper"):
        return _function(importlib.import_module(f"orchestrator.commands.{name}"), name)
    if name in ("explain", "diff"):
        from orchestrator.commands import explain

        return _function(explain, name)
    if name == "new":
        from orchestrator.commands.new import new

        return new
    if name == "init":
        from orchestrator.commands.init import init

        return init
    if name == "data":
        from orchestrator.commands.data import data

        return data
    if name == "export":
        from orchestrator.commands.export import export

        return export
    if name in ("compare", "effects"):
        from orchestrator.commands import compare

        return _function(compare, name)
    if name in ("table", "report", "sync", "ui"):
        from orchestrator.commands import results

        return _function(results, name)
    from orchestrator.commands import admin

    return _function(admin, name)


def _function(module: ModuleType, name: str) -> Callable[..., int]:
    function: Callable[..., int] = getattr(module, name)
    return function


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if words is None else words
    debug = "--debug" in words or bool(os.environ.get("MOEGRID_DEBUG"))
    try:
        arguments = parse(words)
        if arguments.command in ("schema", "doctor", "init", "new", "data"):
            return command_function(arguments.command)(arguments)
        from orchestrator.commands.context import Context

        return command_function(arguments.command)(Context.open(arguments))
    except MoegridError as error:
        if debug:
            raise
        from orchestrator.ui.console import Console

        console = Console()
        for line in str(error).split("\n"):
            console.tell(line)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_DETACHED
    except BrokenPipeError:
        # The reader of stdout (head, less) went away: nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_DONE
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename:
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            print("hint: check this path, its rights and the disk; nothing in the store is lost", file=sys.stderr)
            return EXIT_FAILED
        print(
            f"error: moegrid itself failed: {type(error).__name__}: {error}\n"
            "hint: nothing in the store is lost; run again with --debug for a traceback to report",
            file=sys.stderr,
        )
        return EXIT_FAILED
