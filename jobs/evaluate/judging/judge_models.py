"""Judges that are models: a sequence classifier (`reward_model`) and a causal LM that says safe or unsafe
(`llama_guard`).

Weights are safetensors, in the precision they were saved in; no code of a checkpoint is run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.data.hub import TOKENIZER_FILES, snapshot
from jobs.evaluate.encoding import Encoder
from jobs.evaluate.prefix_lm import PrefixLM, window
from orchestrator.catalog.judges import JUDGES
from orchestrator.errors import MoegridError, SourceError
from orchestrator.spec.cell import JudgeSpec

Pair = tuple[str, str]  # prompt, response
VERDICTS = ("safe", "unsafe")
BATCH = 8


def local_folder(judge: JudgeSpec) -> Path:
    """Return the folder of the judge's checkpoint, fetched from the hub if need be; SourceError when there is none."""
    if judge.source.startswith("file://"):
        folder = Path(judge.source.removeprefix("file://"))
        if not (folder / "config.json").is_file():
            raise SourceError(f"{judge.source} is no checkpoint", cause=f"{folder / 'config.json'} does not exist")
        return folder
    return snapshot(judge.source, [*TOKENIZER_FILES, "*.safetensors"], revision=judge.revision)


def load_checkpoint(judge: JudgeSpec, kind: str, device: str) -> tuple[Any, Any]:
    """Return (tokenizer, model) of a transformers auto class `kind`.

    MoegridError when weights are missing: transformers would draw them at random.
    """
    import transformers

    folder = local_folder(judge)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model, report = getattr(transformers, kind).from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise MoegridError(f"judge {judge.name!r} cannot be loaded from {judge.source}", cause=str(error)) from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise MoegridError(
            f"{judge.source} is no judge of kind {judge.name!r}",
            cause=f"the checkpoint lacks {', '.join(missing[:4])}",
            hint="name a trained sequence classifier" if "Sequence" in kind else "name a causal language model",
        )
    return tokenizer, model.to(device).eval()


class RewardModel:
    """A classifier's score of (prompt, response): its one output, or the probability of the class `judge.label`."""

    def __init__(self, judge: JudgeSpec, device: str, ranks: int = 1) -> None:
        self.template = judge.template or JUDGES.get(judge.name).template
        self.tokenizer, self.model = load_checkpoint(judge, "AutoModelForSequenceClassification", device)
        self._class = self._chosen(judge.label)
        self.bounds = (0.0, 1.0) if judge.label else (-math.inf, math.inf)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.truncation_side = "left"  # the response stands at the end
        self._window = window(self.model, self.tokenizer)

    def _chosen(self, label: str) -> int:
        names = {str(name): int(number) for number, name in self.model.config.id2label.items()}
        count = self.model.config.num_labels
        if count == 1 and not label:
            return -1
        if label in names:
            return names[label]
        among = f", none of them {label!r}" if label else ", and none was chosen"
        raise MoegridError(
            f"the judge has {count} label{'' if count == 1 else 's'}{among}",
            cause=f"its labels are {', '.join(names)}",
            hint="set the judge's label to the class whose probability is the score" if count > 1 else "set no label",
        )

    @torch.inference_mode()
    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        """Return the score of each pair."""
        texts = [fill(self.template, *pair) for pair in pairs]
        found: list[float] = []
        for at in range(0, len(texts), BATCH):
            batch = self.tokenizer(
                texts[at : at + BATCH], return_tensors="pt", padding=True, truncation=True, max_length=self._window
            ).to(self.model.device)
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
            scores = logits[:, 0] if self._class < 0 else logits.softmax(-1)[:, self._class]
            found += [float(score) for score in scores]
        return found


class LlamaGuard:
    """The probability that a safeguard model answers `unsafe` rather than `safe` to its template."""

    def __init__(self, judge: JudgeSpec, device: str, ranks: int = 1) -> None:
        tokenizer, model = load_checkpoint(judge, "AutoModelForCausalLM", device)
        self._lm = PrefixLM(model, tokenizer)
        self._encoder = Encoder(tokenizer, self._lm.prefix_token_id)
        self._verdicts = [self._encoder.encode(verdict, special=False) for verdict in VERDICTS]
        self._own = judge.template
        self.template = judge.template or str(tokenizer.chat_template or "")
        if not self.template:
            raise MoegridError(
                f"judge {judge.source} has no prompt template",
                cause="its tokenizer has no chat template, and the judge's template is not set",
                hint="set template: the text with {prompt} and {response} to which it answers safe or unsafe",
            )

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        """Return the probability of `unsafe` for each pair."""
        contexts = [fill(self._own, *pair) if self._own else self._chat(*pair) for pair in pairs]
        # As in generation, the verdict's tokens follow those of the whole prompt: the two never merge into one.
        requests = [(self._encoder.encode(context), verdict) for context in contexts for verdict in self._verdicts]
        scores = self._lm.score(self._lm.schedule(requests))
        safe, unsafe = scores.loglikelihood.reshape(-1, 2).T
        return [float(p) for p in 1.0 / (1.0 + np.exp(safe - unsafe))]

    def _chat(self, prompt: str, response: str) -> str:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text: str = self._lm.tokenizer.apply_chat_template(turns, tokenize=False)
        return text


def fill(template: str, prompt: str, response: str) -> str:
    """Return a template with the prompt and the response in their places, whatever braces these hold."""
    before, _, after = template.partition("{response}")
    return before.replace("{prompt}", prompt) + response + after.replace("{prompt}", prompt)
