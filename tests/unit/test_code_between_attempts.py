"""A state is continued by other training code only where its user says so; other development refuses nothing."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from jobs.node import code
from jobs.node.code import JOBS, code_digest
from jobs.node.failures import describe
from orchestrator.engine.retry import rule
from orchestrator.errors import CodeError
from orchestrator.spec.cell import TrainSpec
from orchestrator.store import Store
from tests.training import EXECUTION, TRAIN, init_work, prepare, run_chain, segments

ALLOWED = dataclasses.replace(EXECUTION, allow_code=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the data plane that may be edited."""
    return Path(shutil.copytree(JOBS, tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__")))


def edit(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text, f"{name} has no {old!r}"
    (root / name).write_text(text.replace(old, new))


CHANGES = (
    ("moe/routers/base.py", "clamp_min(", "clamp_max("),
    ("moe/balance.py", "def balance_loss(", "def another_loss("),
    ("train/loop.py", "reseed(", "reseed(1 + "),
    ("train/optimizer.py", "weight_decay", "weight_loss"),
    ("models/loss.py", "import torch", "import torch as _torch"),
    ("data/packing.py", "IGNORED = -100", "IGNORED = -99"),
)


def test_a_change_of_what_trains_is_other_code(copy: Path) -> None:
    digests = {code_digest(JOBS), code_digest(copy)}
    assert len(digests) == 1
    for name, old, new in CHANGES:
        edit(copy, name, old, new)
        code_digest.cache_clear()
        digests.add(code_digest(copy))
    assert len(digests) == 1 + len(CHANGES)


def test_ordinary_development_is_no_other_code(copy: Path) -> None:
    for path in (copy / "evaluate").glob("*.py"):
        path.write_text(path.read_text() + "\nCHANGED = True\n")
    for name in code.APART:  # how weights come in and go out, before and after training
        (copy / name).write_text((copy / name).read_text() + "\nCHANGED = True\n")
    assert {"models/public.py", "models/layouts.py", "models/vision/onnx_file.py"} <= {*code.APART}
    (copy / "reporter.py").write_text("CHANGED = True\n")
    (copy / "data" / "sources.py").write_text("CHANGED = True\n")
    (copy / "moe" / "README.md").write_text("Notes.\n")
    for folder in code.FOLDERS:
        for path in (copy / folder).glob("*.py"):
            path.write_text(
                f'"""Another docstring.\n\nOf several lines."""\n\n# A comment.\n\n{_undocumented(path)}\n\n'
            )
    assert code_digest(copy) == code_digest(JOBS)


def _undocumented(path: Path) -> str:
    """Return the module without its docstring and with comments at the ends of some lines."""
    text = path.read_text().split('"""', 2)[-1].lstrip("\n")
    return text.replace("from __future__ import annotations\n", "from __future__ import annotations  # kept\n")


def test_text_that_looks_like_a_comment_or_docstring_counts() -> None:
    plain = 'A = "x # y"\nB = 1\n'
    assert code.essence(plain) == plain.rstrip()
    assert code.essence('def f():\n    """Doc."""\n    return """a # b"""  # c\n') == 'def f():\n    return """a # b"""'
    assert code.essence('def f(): "doc"; return 1\n') == 'def f(): "doc"; return 1'
    assert code.essence('class A:\n    """Ä doc\n\n    # of lines"""\n\n    x = 1\n') == "class A:\n    x = 1"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    made = prepare(str(tmp_path / "store"))
    run_chain(made, [init_work()], "init")
    return made


def test_a_state_of_other_code_is_refused_within_a_phase_and_marked_where_it_was_accepted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = segments([("", 0, 4), ("router", 4, 8)], dataclasses.replace(TRAIN, steps=8))
    tuning = TrainSpec(data=TRAIN.data, steps=4, micro_batch=2, sequence_length=16)
    (tuned,) = segments([("", 0, 4)], tuning, phase="finetune", after=first)
    run_chain(store, [first], "first")
    manifest = store.artifacts.get(first.key())
    assert manifest is not None
    assert manifest.provenance["code"] == code_digest()
    assert not manifest.info["mixed_code"]

    monkeypatch.setattr(code, "code_digest", lambda: "0" * 16)
    with pytest.raises(CodeError, match="other training code") as raised:
        run_chain(store, [second], "second")
    assert "--allow-code" in raised.value.hint
    record = describe(second.key(), raised.value)
    assert record["kind"] == "code"
    assert rule("code").outside, "resume tries again once the code that made the state is back"

    run_chain(store, [tuned], "third")
    run_chain(store, [second], "fourth", execution=ALLOWED)
    for work in (second, tuned):
        made = store.artifacts.get(work.key())
        assert made is not None
        assert made.info["mixed_code"]
        assert made.provenance["code"] == "0" * 16


def test_a_state_of_an_earlier_version_says_no_code_and_is_continued(store: Store) -> None:
    first, second = segments([("", 0, 4), ("router", 4, 8)], dataclasses.replace(TRAIN, steps=8))
    run_chain(store, [first], "first")
    manifest = store.artifacts.get(first.key())
    assert manifest is not None
    old = {name: value for name, value in manifest.provenance.items() if name != "code"}
    numerics = {n: v for n, v in manifest.numerics.items() if n not in ("mkl_branch", "cpu", "variables")}
    store.artifacts.discard(first.key())
    store.artifacts.commit(dataclasses.replace(manifest, provenance=old, numerics=numerics))
    run_chain(store, [second], "second")
    made = store.artifacts.get(second.key())
    assert made is not None
    assert not made.info["mixed_code"]
    assert not made.info["mixed_numerics"]
