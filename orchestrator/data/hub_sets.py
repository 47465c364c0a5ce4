"""Known data sets and models of the hub: configurations, splits and columns as they lie there, gate and licence.

A plan refuses a field that such a set does not have before anything runs. What is not in this table is read all the
same; then a wrong field is found while data are prepared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from orchestrator.catalog.benchmarks import BENCHMARKS
from orchestrator.errors import did_you_mean
from orchestrator.spec.cell import DataSpec

Columns = tuple[str, ...]
# Repositories known by these names alone: hub://ORG/NAME[:CONFIG][@REVISION]. CONFIG is a configuration, several joined
# by +, * for all that the card declares, or a folder of the repository.
NAME = re.compile(r"^hub://([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?::(\*|[\w.+-]+(?:/[\w.-]+)*))?(?:@([\w./-]+))?$")
ALL_CONFIGS = "*"
# The fields that instruction data are read from unless a grid names others.
EXCHANGE = ("prompt", "response")
CONVERSATIONS = "conversations"


@dataclass(frozen=True, slots=True)
class HubSet:
    """A data set: columns by configuration (the first is read unless one is named), and its splits."""

    configs: Mapping[str, Columns]
    splits: tuple[str, ...]
    licence: str
    gated: bool = False


@dataclass(frozen=True, slots=True)
class HubModel:
    """A checkpoint with its tokenizer, or a judge."""

    licence: str
    gated: bool = False


_PAIR = ("premise", "hypothesis", "label")
_ALL = ("train", "validation", "test")
_GLUE = {
    "sst2": ("sentence", "label", "idx"),
    "qqp": ("question1", "question2", "label", "idx"),
    "mnli": (*_PAIR, "idx"),
    "mnli_matched": (*_PAIR, "idx"),
    "mnli_mismatched": (*_PAIR, "idx"),
    "qnli": ("question", "sentence", "label", "idx"),
    "rte": ("sentence1", "sentence2", "label", "idx"),
}
_ROUNDS = tuple(f"{part}_r{number}" for part in ("train", "dev", "test") for number in (1, 2, 3))

HUB_SETS: dict[str, HubSet] = {
    "JeanKaddour/minipile": HubSet({"default": ("text",)}, _ALL, "each document's own (a part of The Pile)"),
    "DKYoon/SlimPajama-6B": HubSet({"default": ("text", "meta")}, _ALL, "each part's own (a sample of SlimPajama)"),
    "cerebras/SlimPajama-627B": HubSet(
        {f"train/chunk{number}": ("text", "meta") for number in range(1, 11)}, ("train",), "each part's own"
    ),
    # `conversations` is a list of texts that take turns. Its train split has 1,000 of two turns and 30 of more, its
    # test split prompts alone.
    "GAIR/lima": HubSet(
        {"plain_text": (CONVERSATIONS, "source")}, ("train", "test"), "CC BY-NC-SA, or that of a stricter source", True
    ),
    "walledai/XSTest": HubSet({"default": ("prompt", "focus", "type", "note", "label")}, ("test",), "CC BY 4.0"),
    "google-research-datasets/nq_open": HubSet(
        {"nq_open": ("question", "answer")}, ("train", "validation"), "CC BY-SA 3.0"
    ),
    "openai/gsm8k": HubSet({"main": ("question", "answer")}, ("train", "test"), "MIT"),
    "truthfulqa/truthful_qa": HubSet(
        {
            "multiple_choice": ("question", "mc1_targets", "mc2_targets"),
            "generation": (
                "type",
                "category",
                "question",
                "best_answer",
                "correct_answers",
                "incorrect_answers",
                "source",
            ),
        },
        ("validation",),
        "Apache-2.0",
    ),
    "AI-Secure/adv_glue": HubSet(
        {f"adv_{name}": columns for name, columns in _GLUE.items() if name != "mnli_matched"},
        ("validation",),
        "CC BY-SA 4.0",
    ),
    "nyu-mll/glue": HubSet(
        _GLUE,
        (
            *_ALL,
            *(f"{part}_{pairing}" for part in ("validation", "test") for pairing in ("matched", "mismatched")),
        ),
        "each task's own",
    ),
    "tatsu-lab/alpaca": HubSet({"default": ("instruction", "input", "output", "text")}, ("train",), "CC BY-NC 4.0"),
    "facebook/anli": HubSet({"plain_text": ("uid", *_PAIR, "reason")}, _ROUNDS, "CC BY-NC 4.0"),
    "stanfordnlp/snli": HubSet({"plain_text": _PAIR}, ("test", "validation", "train"), "CC BY-SA 4.0"),
    "nyu-mll/blimp": HubSet({ALL_CONFIGS: ("sentence_good", "sentence_bad", "UID")}, ("train",), "CC BY 4.0"),
    "EleutherAI/race": HubSet({"high": ("article", "problems")}, ("test",), "non-commercial research"),
    "cam-cst/cbt": HubSet(
        {
            name: ("title", "content") if name == "raw" else ("sentences", "question", "answer", "options")
            for name in ("CN", "NE", "P", "V", "raw")
        },
        _ALL,
        "GFDL",
    ),
}
HUB_MODELS: dict[str, HubModel] = {
    "allenai/OLMoE-1B-7B-0924": HubModel("Apache-2.0"),
    "deepseek-ai/deepseek-moe-16b-base": HubModel("DeepSeek licence"),
    "llama-moe/LLaMA-MoE-v1-3_5B-2_8": HubModel("Apache-2.0"),
    "openlm-research/open_llama_3b_v2": HubModel("Apache-2.0"),
    "meta-llama/LlamaGuard-7b": HubModel("Llama 2 Community License", gated=True),
    "microsoft/Phi-3.5-mini-instruct": HubModel("MIT"),
    "google/siglip-so400m-patch14-224": HubModel("Apache-2.0"),
}


@dataclass(frozen=True, slots=True)
class HubName:
    """`hub://ORG/NAME[:CONFIG][@REVISION]` in its parts; "" where it says nothing."""

    name: str
    config: str = ""
    revision: str = ""


def hub_name(source: str) -> HubName:
    """Return the parts of a hub source; ValueError when it is none."""
    match = NAME.match(source)
    if match is None:
        raise ValueError(f"{source} is no hub source: write hub://ORG/NAME[:CONFIG][@REVISION]")
    name, config, revision = match.groups()
    return HubName(name, config or "", revision or "")


def is_gated(source: str) -> bool:
    """Return whether a known repository is given out only to who has accepted its terms."""
    match = NAME.match(source)
    known = match and (HUB_SETS.get(match[1]) or HUB_MODELS.get(match[1]))
    return bool(known and known.gated)


def layout_findings(data: DataSpec) -> Iterator[tuple[str, str, str]]:
    """Yield (field of `data`, what is wrong, hint) where a known set has no such configuration, split or column."""
    match = NAME.match(data.source)
    known = HUB_SETS.get(match[1]) if match else None
    if match is None or known is None:
        return
    name, config, _ = match.groups()
    if unknown := _unknown(config, known):
        yield "source", f"{name} has no configuration {unknown!r}", did_you_mean(unknown, known.configs, "it has")
        return
    columns = _columns(config, known)
    if data.format not in ("text", "instruction"):
        return
    if data.split not in known.splits:
        yield "split", f"{name} has no split {data.split!r}", did_you_mean(data.split, known.splits, "it has")
    fields = ["text_field"] if data.format == "text" else ["prompt_field", "response_field"]
    if data.task:
        return
    if (data.prompt_field, data.response_field) == EXCHANGE and CONVERSATIONS in columns and data.format != "text":
        return
    for field in fields:
        value = getattr(data, field)
        if value.partition(".")[0] not in columns:
            yield field, f"{name} has no column {value!r}", _columns_hint(columns)


def items_findings(source: str, task: str, needed: Columns) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, hint) where the items of a task come from a known set without its columns."""
    match = NAME.match(source)
    known = HUB_SETS.get(match[1]) if match else None
    if match is None or known is None:
        return
    name, config, _ = match.groups()
    if unknown := _unknown(config, known):
        yield f"{name} has no configuration {unknown!r}", did_you_mean(unknown, known.configs, "it has")
        return
    columns = _columns(config, known)
    if missing := [column for column in needed if column not in columns]:
        yield f"{name} has no column {missing[0]!r}, which task {task!r} reads", _columns_hint(columns)


def benchmark_findings(source: str, benchmark: str) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, hint) where a benchmark is to come from a known set that is another one."""
    match = NAME.match(source)
    own = BENCHMARKS[benchmark].hub.partition(":")[0]
    if match and match[1] in HUB_SETS and match[1] != own:
        hint = f"use hub://{own}, or file://: it is read from " if own else "use file://: it is read from "
        yield f"{match[1]} does not hold the items of {benchmark}", hint + BENCHMARKS[benchmark].files


def joined(config: str, configs: Iterable[str]) -> list[str]:
    """Return the configurations that `config` names: one, several joined by +, or all of `configs`."""
    return list(configs) if config == ALL_CONFIGS else config.split("+")


def _unknown(config: str | None, known: HubSet) -> str:
    """Return the first named configuration that a set does not have, "" when it has all."""
    named = joined(config, known.configs) if config else []
    return next((one for one in named if one not in known.configs and ALL_CONFIGS not in known.configs), "")


def _columns(config: str | None, known: HubSet) -> Columns:
    """Return the columns that all of the named configurations have, by default those of the first."""
    named = joined(config, known.configs) if config else list(known.configs)[:1]
    sets = [known.configs.get(one, known.configs.get(ALL_CONFIGS, ())) for one in named]
    return tuple(column for column in sets[0] if all(column in other for other in sets))


def _columns_hint(columns: Columns) -> str:
    hint = f"it has the columns {', '.join(columns)}"
    if CONVERSATIONS in columns:
        hint += f"; {EXCHANGE[0]} and {EXCHANGE[1]} together mean the first exchange of a conversation"
    return hint
