"""`model.checkpoint` alone is enough: its config.json need not be said again, and must not be said otherwise."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.catalog.public_models import PUBLIC_MODELS
from orchestrator.errors import GridError
from orchestrator.grid.idle import idle_words
from orchestrator.grid.load import Grid, load_grid
from orchestrator.spec.identity import canonical_text, plain
from orchestrator.spec.model import Model
from orchestrator.spec.public_config import spec_of
from orchestrator.spec.rebuilding import build
from orchestrator.spec.resolve import resolve_moe
from tests.tokenizer_families import FAMILIES, LLAMA

Load = Callable[..., Grid]
OLMOE = {
    **LLAMA,
    "model_type": "olmoe",
    "num_key_value_heads": 6,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
TUNE = "pretrain: null, finetune.data: {source: 'file://examples.jsonl'}"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with two checkpoints, as far as a plan reads them, and examples to fine-tune on."""
    for name, config in (("dense", LLAMA), ("sparse", OLMOE)):
        FAMILIES["gpt2"](tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    rows = [{"prompt": f"{i}?", "response": f"{i}!"} for i in range(40)]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_sparse_checkpoint_gives_its_whole_shape(load: Load, here: Path) -> None:
    cell = load(f"set: {{{TUNE}, model.checkpoint: 'file://sparse'}}").cells[0].cell
    model, moe = cell.model, cell.model.moe
    shape = (model.backbone, model.hidden_size, model.num_layers, model.num_heads, model.num_kv_heads)
    assert shape == ("olmoe", 96, 3, 6, 6)
    others = (model.vocab_size, model.context, model.rope_theta, model.norm_eps, model.tie_embeddings)
    assert others == (384, 200, 50000.0, 2e-6, False)
    assert (moe.preset, moe.num_experts, moe.top_k, moe.expert_width, moe.renormalise) == ("olmoe", 12, 3, 256, True)
    assert cell.tokenizer.kind == "pretrained"
    assert cell.tokenizer.source == f"file://{here}/sparse"
    assert cell.tokenizer.vocab_size == 384
    # Defaults of the recipe and of the scale that are longer than its context give way.
    assert cell.finetune is not None
    assert cell.finetune.sequence_length == 200
    assert cell.evaluate.max_length == 200


def test_a_dense_checkpoint_is_upcycled_into_experts_as_wide_as_its_feed_forward(load: Load, here: Path) -> None:
    grid = load(
        f"factors: {{upcycle: [copy, partial]}}\nbaseline: {{upcycle: copy}}\n"
        f"set: {{{TUNE}, model: {{checkpoint: 'file://dense', moe: {{preset: smoe, num_experts: 8}}}}}}"
    )
    for item in grid.cells:
        model = item.cell.model
        assert (model.backbone, model.num_kv_heads, model.tie_embeddings) == ("llama", 2, True)
        assert (model.moe.preset, model.moe.num_experts, model.moe.expert_width) == ("smoe", 8, 256)


def test_a_factor_of_checkpoints_gives_each_cell_its_own_shape_and_tokenizer(load: Load, here: Path) -> None:
    FAMILIES["llama3"](here / "dense")
    (here / "dense" / "config.json").write_text(json.dumps(LLAMA))
    grid = load(f"factors: {{checkpoint: ['file://dense', 'file://sparse']}}\nset: {{{TUNE}}}")
    shapes = [(item.cell.model.moe.preset, item.cell.model.num_kv_heads) for item in grid.cells]
    assert shapes == [("dense", 2), ("olmoe", 6)]
    sources = [item.cell.tokenizer.source for item in grid.cells]
    assert sources == [f"file://{here}/dense", f"file://{here}/sparse"]


def test_what_the_grid_itself_says_must_agree_and_all_of_it_is_told(load: Load, here: Path) -> None:
    said = "hidden_size: 64, num_kv_heads: 6, rope_theta: 1e4, norm_eps: 2e-6, moe: {num_experts: 16, top_k: 2}"
    with pytest.raises(GridError) as caught:
        load(f"set:\n  model: {{checkpoint: 'file://sparse', {said}}}\n  {TUNE.replace(', ', chr(10) + '  ')}\n")
    text = str(caught.value)
    for field, ours, its in (("hidden_size", 64, 96), ("rope_theta", 10000.0, 50000.0), ("moe.num_experts", 16, 12)):
        assert f"model.{field} is {ours}, but checkpoint 'file://{here}/sparse' has {its}" in text
    assert len(caught.value.problems) == 3  # fewer experts a token are a choice, what agrees is none
    assert {problem.where.rpartition("/")[2] for problem in caught.value.problems} == {"grid.yaml:3"}


@pytest.mark.parametrize(
    "model, said",
    [
        ("checkpoint: 'file://sparse', upcycle: copy", "has 12 experts"),
        ("checkpoint: 'file://dense', moe: {preset: smoe}", "set model.upcycle"),
        ("checkpoint: 'file://dense', backbone: olmoe, moe: {preset: dense}", "model.backbone is 'olmoe'"),
        ("checkpoint: 'file://mla'", "cannot be imported"),
        ("checkpoint: 'file://bare'", "has no config.json"),
        ("checkpoint: 'file://broken'", "is no JSON"),
        ("checkpoint: 'hub://nobody/nothing'", "hf download"),
    ],
)
def test_a_checkpoint_that_cannot_be_started_from_is_refused_by_the_plan(
    load: Load, here: Path, model: str, said: str
) -> None:
    for name, content in (("mla", '{"model_type": "deepseek_v3"}'), ("bare", ""), ("broken", "{")):
        (here / name).mkdir()
        (here / name / ("config.json" if content else "model.safetensors")).write_text(content)
    with pytest.raises(GridError, match=said):
        load(f"set: {{{TUNE}, model: {{{model}}}}}")


def test_a_hub_checkpoint_is_read_from_the_cache_else_from_the_table(
    load: Load, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(here / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    grid = f"set: {{{TUNE}, model.checkpoint: 'hub://%s'}}"
    model = load(grid % "allenai/OLMoE-1B-7B-0924").cells[0].cell.model
    assert (model.hidden_size, model.moe.num_experts, model.context) == (2048, 64, 4096)
    cache = here / "home" / "hub" / "models--someone--small"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("c0ffee")
    (cache / "snapshots" / "c0ffee").mkdir(parents=True)
    os.symlink(here / "sparse" / "config.json", cache / "snapshots" / "c0ffee" / "config.json")
    cell = load(grid % "someone/small").cells[0].cell
    assert cell.model.hidden_size == 96
    assert cell.tokenizer.source == "hub://someone/small"


def test_heads_biases_and_norms_of_the_attention_come_from_the_checkpoint_too(load: Load, here: Path) -> None:
    qwen = {**OLMOE, "model_type": "qwen3_moe", "moe_intermediate_size": 24, "head_dim": 20, "num_key_value_heads": 2}
    (here / "sparse" / "config.json").write_text(json.dumps(qwen))
    model = load(f"set: {{{TUNE}, model.checkpoint: 'file://sparse'}}").cells[0].cell.model
    assert (model.head_dim, model.qk_norm, model.attention_bias, model.moe.expert_width) == (20, "head", "", 24)
    with pytest.raises(GridError, match=r"model\.head_dim is 16, but checkpoint .* has 20"):
        load(f"set: {{{TUNE}, model: {{checkpoint: 'file://sparse', head_dim: 16}}}}")
    (here / "dense" / "config.json").write_text(json.dumps({**LLAMA, "attention_bias": True}))
    model = load(f"set: {{{TUNE}, model.checkpoint: 'file://dense'}}").cells[0].cell.model
    assert (model.head_dim, model.attention_bias) == (0, "all")


@pytest.mark.parametrize(
    "field, said",
    [("head_dim: 9", "must be even"), ("qk_norm: heads", "did you mean 'head'"), ("attention_bias: yes", "qkv")],
)
def test_a_bad_value_of_the_attention_is_refused(load: Load, field: str, said: str) -> None:
    with pytest.raises(GridError, match=said):
        load(f"set: {{model: {{{field}}}}}")


def test_a_single_expert_whose_weight_is_renormalised_is_told_of_not_refused(load: Load, here: Path) -> None:
    """As such public models compute it: a weight of 1. In a model of our own it stays an error."""
    mixtral = {**OLMOE, "model_type": "mixtral", "num_local_experts": 12, "num_experts_per_tok": 1}
    (here / "sparse" / "config.json").write_text(json.dumps(mixtral))
    grid = load(f"set: {{{TUNE}, model.checkpoint: 'file://sparse'}}")
    moe = resolve_moe(grid.cells[0].cell.model.moe)
    assert (moe.top_k, moe.renormalise, moe.fixed_weight) == (1, True, True)
    (told,) = idle_words(grid.cells)
    effect = "leaves the router without a gradient of the task in 1 cell"
    assert str(told).startswith(f"model.moe.fixed_weight: true {effect}")
    two = load(f"set: {{{TUNE}, model: {{checkpoint: 'file://sparse', moe: {{top_k: 2}}}}}}").cells[0].cell.model.moe
    assert (two.top_k, two.fixed_weight) == (2, False)
    for other in ("renormalise: false", "choice: expert"):
        raw = f"set: {{{TUNE}, model: {{checkpoint: 'file://sparse', moe: {{{other}}}}}}}"
        assert not load(raw).cells[0].cell.model.moe.fixed_weight
    with pytest.raises(GridError, match="the router gets no task gradient"):
        load("set: {model.moe: {preset: smoe, top_k: 1, num_experts: 4}}")
    with pytest.raises(GridError, match="it needs top_k 1 and renormalise"):
        load("set: {model.moe: {preset: smoe, top_k: 2, num_experts: 4, fixed_weight: true}}")


def test_another_checkpoint_file_is_another_model(load: Load, here: Path) -> None:
    before = load(f"set: {{{TUNE}, model.checkpoint: 'file://sparse'}}").cells[0].id
    (here / "sparse" / "config.json").write_text(json.dumps({**OLMOE, "rope_theta": 6e4}))
    after = load(f"set: {{{TUNE}, model.checkpoint: 'file://sparse'}}").cells[0]
    assert after.id != before
    assert after.cell.model.rope_theta == 6e4


def test_the_models_of_shipped_grids_are_known_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent")
    named = {
        item.cell.model.checkpoint
        for grid in ("finetune_freeze", "libmoe_vlm", "rbench_robustness", "upcycle_smollm2")
        for item in load_grid(grid, scale="paper").cells
    }
    assert named == set(PUBLIC_MODELS)
    assert all(spec_of(config).num_layers for config in PUBLIC_MODELS.values())


@pytest.mark.parametrize(
    "fields, said",
    [
        ("full_every: 2", "needs attention_window"),
        ("norm_order: after", "must be one of 'pre', 'post'"),
        ("attention_window: -1", "must be at least 0"),
        ("rope: {scaling: yarn}", "needs rope.original_context"),
        ("rope: {scaling: ntk}", "must be one of '', 'yarn'"),
        ("rope: {scaling: llama3}", "needs rope.original_context"),
        ("rope: {scaling: llama3, original_context: 64, low_freq_factor: 5}", "must be above low_freq_factor 5"),
        ("rope: {scaling: dynamic, original_context: 64}, context: 128", "a later token changes what came before"),
        ("rope: {scaling: longrope, short_factor: [1], long_factor: [2]}", "needs rope.original_context"),
        ("rope: {scaling: longrope, original_context: 64, long_factor: [2]}", "16 pairs of a head turn"),
        ("rope: {scaling: longrope, original_context: 64, long_factor: [0]}", "must be above 0"),
        ("rope: {scaling: longrope, original_context: 64, long_factor: 2}", "must be a list of numbers"),
        ("rope: {scaling: linear, factor: 0}", "must be above 0"),
        ("rope: {fraction: 0.3}", "must be an even width"),
        ("rope: {interleaved: true}", "for latent attention alone"),
        ("latent: {kv_rank: 16}", "latent.plain_dim must be at least 1"),
        ("latent: {q_rank: 16}", "needs latent.kv_rank"),
        ("latent: {kv_rank: 8, plain_dim: 4, rotary_dim: 3, value_dim: 4}, backbone: llama", "must be even"),
        ("latent: {kv_rank: 8, plain_dim: 4, rotary_dim: 4, value_dim: 4}", "qk_norm does not apply"),
        ("multipliers: {residual: 0}", "must be above 0"),
        ("multipliers: {logit: 2}", "did you mean"),
        ("attention_sinks: 1", "must be true or false"),
    ],
)
def test_a_bad_part_of_a_public_attention_is_refused(load: Load, fields: str, said: str) -> None:
    with pytest.raises(GridError, match=said):
        load(f"set: {{model: {{{fields}}}}}")


def test_parts_of_an_attention_change_their_own_cells_alone(load: Load) -> None:
    usual = load("set: {}").cells[0].id
    parts = (
        "attention_window: 32",
        "attention_window: 32, model.full_every: 2",
        "attention_sinks: true",
        "norm_order: post",
        "rope.fraction: 0.5",
        "rope: {scaling: linear, factor: 2}",
        "rope: {scaling: llama3, factor: 2, original_context: 64}",
        "rope: {scaling: llama3, factor: 2, original_context: 64, low_freq_factor: 0.5}",
        f"rope: {{scaling: longrope, original_context: 64, short_factor: {16 * [1]}, long_factor: {16 * [2]}}}",
        f"rope: {{scaling: longrope, original_context: 64, short_factor: {16 * [1]}, long_factor: {16 * [3]}}}",
        "multipliers.residual: 0.5",
    )
    found = {load(f"set: {{model.{part}}}").cells[0].id for part in parts}
    assert len(found | {usual}) == len(parts) + 1
    assert load("set: {model.attention_window: 0, model.multipliers: {logits: 1}}").cells[0].id == usual


def test_what_a_checkpoint_says_of_its_parts_must_agree(load: Load, here: Path) -> None:
    granite = {**OLMOE, "model_type": "granitemoe", "num_local_experts": 12, "residual_multiplier": 0.25}
    (here / "sparse" / "config.json").write_text(json.dumps(granite))
    model = load(f"set: {{{TUNE}, model.checkpoint: 'file://sparse'}}").cells[0].cell.model
    assert (model.multipliers.residual, model.moe.renormalise, model.normed) == (0.25, True, "")
    with pytest.raises(GridError, match=r"model\.multipliers\.residual is 0\.5, but checkpoint .* has 0\.25"):
        load(f"set: {{{TUNE}, model: {{checkpoint: 'file://sparse', multipliers: {{residual: 0.5}}}}}}")
    quantised = {**granite, "quantization_config": {"quant_method": "mxfp4"}}
    (here / "sparse" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(GridError, match="quantization_config"):
        load(f"set: {{{TUNE}, model.checkpoint: 'file://sparse'}}")


@pytest.mark.parametrize(
    "model, said",
    [
        ("upcycling: {groups: true}, moe: {preset: dense}", "upcycling.groups needs model.upcycle"),
        ("upcycle: shared_only, upcycling: {noise: 0.1}, moe: {shared_experts: 1, expert_width: 64}", "copies no"),
        ("upcycle: copy, upcycling: {redrawn: 0.3}", "does not apply to upcycle 'copy'"),
        ("upcycle: copy, upcycling: {noise: -1}", "must be at least 0"),
        ("upcycle: copy, upcycling: {group: true}", "did you mean 'model.upcycling.groups'"),
        ("upcycle: copy, moe: {expert_width: 100}", "does not divide the checkpoint's feed-forward of 256"),
        ("upcycle: copy, upcycling: {groups: true}, moe: {expert_width: 64, top_k: 3}", "no whole virtual groups"),
        ("upcycle: copy, upcycling: {groups: true}, moe: {preset: xmoe}", "this one has none"),
        ("upcycle: copy, upcycling: {scale_weights: true}, moe: {score: sigmoid, renormalise: false}", "renormalised"),
    ],
)
def test_a_recipe_of_upcycling_that_does_not_fit_is_refused(load: Load, here: Path, model: str, said: str) -> None:
    block = "preset: smoe, num_experts: 8"
    text = model.replace("moe: {", f"moe: {{{block}, " if "preset" not in model else "moe: {num_experts: 8, ")
    text = text if "moe:" in text else f"{text}, moe: {{{block}}}"
    with pytest.raises(GridError, match=said):
        load(f"set: {{{TUNE}, model: {{checkpoint: 'file://dense', {text}}}}}")


def test_recipes_of_upcycling_have_keys_of_their_own_and_others_keep_theirs(load: Load, here: Path) -> None:
    block = "moe: {preset: smoe, num_experts: 8, top_k: 4, expert_width: 128}"
    base = f"{TUNE}, model: {{checkpoint: 'file://dense', upcycle: copy, {block}}}"
    usual = load(f"set: {{{base}}}").cells[0].id
    factors = ("upcycling_noise: [0.1]", "upcycling_groups: [true]", "upcycling_scale_weights: [true]")
    found = {load(f"factors: {{{factor}}}\nset: {{{base}}}").cells[0].id for factor in factors}
    assert len(found | {usual}) == 4
    assert load(f"factors: {{upcycling_noise: [0.0]}}\nset: {{{base}}}").cells[0].id == usual


def test_a_llama_is_called_so_and_its_former_name_lives_in_keys_alone(load: Load) -> None:
    model = load("set: {model.backbone: llama}").cells[0].cell.model
    assert '"backbone":"smollm2"' in canonical_text(model)
    written = plain(model)
    assert written["backbone"] == "llama"
    assert build(Model, written) == model
    # A document of an earlier version.
    assert build(Model, {**written, "backbone": "smollm2"}) == model
