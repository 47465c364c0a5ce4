"""Classification data as prompts and answers: what MoE-RBench fine-tunes on before it shifts the test.

Prompt and answers are those of the tasks that measure the shift (jobs/evaluate/tasks), so that a model is asked what it
was tuned on; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# Pairs on which the annotators of SNLI did not agree.
UNLABELLED = ("-", "-1")


@dataclass(frozen=True, slots=True)
class Labelled:
    """One kind of classification.

    `columns` are the names under which published files have each part of the prompt, and `label` those of the label;
    `prompt` has the parts in braces; `answers` maps a label as the files write it to the answer. `like` is the task
    that asks the same.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    prompt: str
    answers: Mapping[str, str]
    like: str
    label: tuple[str, ...] = ("label", "gold_label", "Label")


_NEGATIVE, _POSITIVE, _NEUTRAL = "negative", "positive", "neutral"
_OURS = (
    Labelled(
        "sst2",
        {"sentence": ("sentence", "text", "Text")},
        "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        {"0": _NEGATIVE, "1": _POSITIVE, _NEGATIVE: _NEGATIVE, _POSITIVE: _POSITIVE},
        "sst2",
    ),
    # SNLI, ANLI, MNLI, WANLI, ContractNLI.
    Labelled(
        "nli",
        {
            "premise": ("premise", "sentence1", "context", "Premise"),
            "hypothesis": ("hypothesis", "sentence2", "Hypothesis"),
        },
        "{premise}\nQuestion: {hypothesis} True, False, or Neither?\nAnswer:",
        {
            "0": "True",
            "e": "True",
            "entailment": "True",
            "1": "Neither",
            "n": "Neither",
            "neutral": "Neither",
            "2": "False",
            "c": "False",
            "contradiction": "False",
        },
        "snli",
    ),
    # BOSS's labels of sentiment and toxicity.
    Labelled(
        "sentiment",
        {"text": ("Text", "text", "sentence")},
        "{text}\nQuestion: Is the sentiment of this text negative, positive or neutral?\nAnswer:",
        {"0": _NEGATIVE, "1": _POSITIVE, "2": _NEUTRAL},
        "boss_sa_amazon",
    ),
    Labelled(
        "toxicity",
        {"text": ("Text", "text", "comment")},
        "{text}\nQuestion: Is this text benign or toxic?\nAnswer:",
        {"0": "benign", "1": "toxic"},
        "boss_td_civil_comments",
    ),
)
LABELLED: Mapping[str, Labelled] = MappingProxyType({kind.name: kind for kind in _OURS})
