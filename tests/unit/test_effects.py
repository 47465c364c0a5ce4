"""Effects of factors and scaling fits, against other ways to compute them and against what was put in."""

from __future__ import annotations

import math
import uuid
from pathlib import Path

import numpy as np
import pytest

from orchestrator import cli
from orchestrator.report import mixed
from orchestrator.report.collect import Results, collect
from orchestrator.report.effects import Effects, effects, table
from orchestrator.report.html import page
from orchestrator.report.scaling import EXPERTS, FLOPS, scaling
from orchestrator.report.statistics import compare, t_quantile
from orchestrator.store import Manifest, Store
from tests.grid_store import GridStore

GRANULARITIES = ("1/4", "2/8", "4/16")
FREEZES = ("none", "router", "expert")


def committed(store: Store, name: str, cells: list[tuple[str, str, int, float]], sizes: dict[str, float]) -> Results:
    """Return the results of cells (granularity, freeze, seed, loss), of which `sizes` are the FLOPs by granularity."""
    grid = GridStore(store, name, settings=[f"{g}|{f}|{s}" for g, f, s, _ in cells], seeds=[0])
    for entry, (granularity, freeze, seed, loss) in zip(grid.cells, cells, strict=True):
        top_k, experts = map(int, granularity.split("/"))
        section = f"m{granularity}"
        grid.document["sections"][section] = {"moe": {"num_experts": experts, "top_k": top_k}}
        entry["factors"] = {"granularity": granularity, "freeze": freeze, "seed": seed}
        entry["setting"] = f"granularity={granularity} freeze={freeze}"
        entry["id"] = f"{name}-{granularity}-{freeze}-{seed}"
        entry["flops_per_token"] = sizes[granularity]
        entry["resolved"]["model"] = section
        last = [r["key"] for r in entry["results"] if r["at"] == 1.0 and r["suite"] == "lm"]
        store.artifacts.commit(Manifest(last[0], "evaluate", {}, attempt="a-0", metrics={"answer_bpb": loss}))
    grid.document["factors"] = ["granularity", "freeze", "seed"]
    return collect(grid.document | {"digest": name}, store)


def drawn(store: Store, name: str = "g", *, leave_out: int = 0, sizes: dict[str, float] | None = None) -> Results:
    chance = np.random.default_rng(7)
    seeds = chance.normal(0, 0.3, 4)
    cells = []
    for i, granularity in enumerate(GRANULARITIES):
        for j, freeze in enumerate(FREEZES):
            for seed in range(4):
                value = 2.0 - 0.1 * i + 0.05 * j + seeds[seed] + chance.normal(0, 0.01)
                cells.append((granularity, freeze, seed, float(value)))
    return committed(store, name, cells[leave_out:], sizes or dict.fromkeys(GRANULARITIES, 1e6))


def of(found: Effects | None) -> dict[tuple[str, str], tuple[float, float, bool]]:
    assert found is not None
    return {(e.factor, e.level): (c.difference, c.stderr or 0.0, c.resolved) for e, c in found.found.items()}


def memory() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def test_a_balanced_design_has_the_contrasts_of_paired_differences() -> None:
    y = np.random.default_rng(0).normal(size=8)
    x = np.stack([np.ones(8), np.tile([0.0, 1.0], 4)], 1)
    found = mixed.fit(y, x, list(np.repeat(range(4), 2)))
    paired = compare(dict(enumerate(y[1::2])), dict(enumerate(y[::2])))
    assert found is not None
    assert paired is not None
    assert found.freedom == 3
    assert found.coefficients[1] == pytest.approx(paired.difference)
    if found.deviation_of_groups > 0:
        assert found.stderr([0, 1]) == pytest.approx(paired.stderr, rel=1e-6)


def test_an_unbalanced_fit_is_where_the_restricted_likelihood_is_largest() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    chance = np.random.default_rng(3)
    groups = [0] * 5 + [1] * 2 + [2] * 4 + [3]
    x = np.stack([np.ones(12), chance.normal(size=12), (chance.random(12) > 0.5).astype(float)], 1)
    y = x @ [1.0, 0.5, -0.3] + np.array([0.0, 1.0, -1.0, 0.5])[groups] + chance.normal(0, 0.4, 12)
    z = (np.array(groups)[:, None] == np.arange(4)).astype(float)

    def solved(logs: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        v = math.exp(logs[0]) * np.eye(12) + math.exp(logs[1]) * z @ z.T
        inverse = np.linalg.inv(v)
        covariance = np.linalg.inv(x.T @ inverse @ x)
        beta = covariance @ x.T @ inverse @ y
        rest = y - x @ beta
        logs_of = np.linalg.slogdet(v)[1] - np.linalg.slogdet(covariance)[1]
        return 0.5 * (logs_of + rest @ inverse @ rest), beta, covariance

    best = optimize.minimize(lambda v: solved(v)[0], [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-10})
    _, beta, covariance = solved(best.x)
    found = mixed.fit(y, x, groups)
    assert found is not None
    assert found.deviation == pytest.approx(math.exp(best.x[0] / 2), rel=1e-4)
    assert found.deviation_of_groups == pytest.approx(math.exp(best.x[1] / 2), rel=1e-4)
    assert found.coefficients == pytest.approx(beta, rel=1e-5)
    assert np.sqrt(np.diag(found.covariance)) == pytest.approx(np.sqrt(np.diag(covariance)), rel=1e-4)


@pytest.mark.parametrize("leave_out", [0, 5])
def test_effects_that_were_put_in_are_found_with_their_deviations(leave_out: int) -> None:
    results = drawn(memory(), leave_out=leave_out)
    found = effects([results], "answer_bpb")
    shown = of(found)
    for i, granularity in enumerate(GRANULARITIES[1:], 1):
        assert shown["granularity", granularity][0] == pytest.approx(-0.1 * i, abs=0.02)
        assert shown["granularity", granularity][2], "resolved though the seeds differ by more"
    assert shown["freeze", "expert"][0] == pytest.approx(0.1, abs=0.02)
    assert found is not None
    assert found.deviation == pytest.approx(0.01, rel=0.5)
    assert found.deviation_of_seeds > 10 * found.deviation


def test_grids_of_a_store_are_one_model_and_what_they_share_is_counted_once() -> None:
    store = memory()
    first, second = drawn(store, "g"), drawn(store, "h", leave_out=18)
    both = effects([first, second], "answer_bpb")
    assert both is not None
    assert both.cells == 36 + 18
    assert of(both)["grid", "h"][0] == pytest.approx(0, abs=0.01)
    assert of(effects([first, first], "answer_bpb")) == of(effects([first], "answer_bpb"))
    shown = table([first, second], ["answer_bpb"])
    assert shown is not None
    assert ("grid", "h", "g", "18") in [labels for labels, _ in shown.rows]


def test_a_factor_that_always_moves_with_another_is_named_and_not_estimated() -> None:
    cells = [
        (g, f, s, 1.0 + i + 0.1 * s * i)
        for i, (g, f) in enumerate(zip(GRANULARITIES, FREEZES, strict=True))
        for s in range(3)
    ]
    found = effects([committed(memory(), "g", cells, dict.fromkeys(GRANULARITIES, 1.0))], "answer_bpb")
    assert found is not None
    assert found.aliased == ("freeze=router", "freeze=expert")
    assert {effect.factor for effect in found.found} == {"granularity"}


def test_a_level_of_other_seeds_alone_is_named_and_not_tested() -> None:
    """Its difference is one of seeds: of two seeds hardly anything is known, however many cells each has."""
    chance = np.random.default_rng(1)
    cells = [("2/8", f"name({i})", seed, float(seed + chance.normal(0, 0.01))) for i in range(9) for seed in (0, 1)]
    found = effects(
        [committed(memory(), "g", [*cells, ("4/16", "name(0)", 7, 0.4)], dict.fromkeys(GRANULARITIES, 1e6))],
        "answer_bpb",
    )
    assert found is not None
    assert found.aliased == ("granularity=4/16",)
    assert {effect.factor for effect in found.found} == {"freeze"}


def test_a_power_law_that_was_put_in_is_found_with_its_interval_and_its_residuals() -> None:
    sizes = {"1/4": 1e6, "2/8": 4e6, "4/16": 32e6}
    chance = np.random.default_rng(2)
    cells = [
        (g, f, s, float(3.0 * (flops / 1e6) ** -0.08 * math.exp(0.02 * s + chance.normal(0, 0.002))))
        for g, flops in sizes.items()
        for f in FREEZES[:2]
        for s in range(3)
    ]
    results = committed(memory(), "g", cells, sizes)
    found = scaling(results, "answer_bpb")
    assert found is not None
    power = {one.size: one for one in found.exponents}
    assert set(power) == {FLOPS, EXPERTS}
    assert power[EXPERTS].low < 0 < power[EXPERTS].high
    assert power[FLOPS].low < -0.08 < power[FLOPS].high
    # The same by least squares on the differences to each seed's mean, which is what REML is where all is balanced.
    rows = np.array([(math.log(sizes[g]), math.log(int(g.split("/")[0])), math.log(v), s) for g, _, s, v in cells])
    centred = np.stack([rows[:, :3][rows[:, 3] == s] - rows[:, :3][rows[:, 3] == s].mean(0) for s in range(3)])
    flat = centred.reshape(-1, 3)
    beta, left, *_ = np.linalg.lstsq(flat[:, :2], flat[:, 2], rcond=None)
    assert [one.value for one in found.exponents] == pytest.approx(beta, rel=1e-6)
    freedom = len(cells) - 3 - 2
    stderr = math.sqrt(left[0] / freedom * np.linalg.inv(flat[:, :2].T @ flat[:, :2])[0, 0])
    assert power[FLOPS].high - power[FLOPS].value == pytest.approx(t_quantile(0.975, freedom) * stderr, rel=1e-6)
    for _, value, fitted in found.points.values():
        assert value / fitted == pytest.approx(1, abs=0.05)
    shown = page(results)
    assert "Loss against size" in shown
    assert "active experts is not resolved from 0" in shown
    assert "Effects of the factors" in shown
    assert scaling(drawn(memory()), "answer_bpb") is None, "one size is no law"


def test_the_command_pools_grids_and_says_what_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOEGRID_STORE", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "120")
    GridStore(Store.open(str(tmp_path / "runs")), effects={"router": 0.3}).commit_all()
    assert cli.main(["effects", "demo"]) == 0
    said = capsys.readouterr().out
    assert "effects of the factors in demo" in said
    assert "instead of" in said
    assert cli.main(["effects", "demo", "--metric", "answer_bpp"]) == 2
    assert "did you mean 'answer_bpb'" in capsys.readouterr().err
    assert cli.main(["effects", "dem"]) == 2
    assert "did you mean 'demo'" in capsys.readouterr().err
