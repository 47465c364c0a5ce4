"""An lm-eval model with the stock harness's scores, several times faster: shared prefixes are computed once.

from lm_eval import simple_evaluate
from jobs.evaluate.prefix_lm import PrefixLM
simple_evaluate(model=PrefixLM(model, tokenizer), tasks=["arc_challenge"], num_fewshot=25)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import ArrayLike

from jobs.data.spans import Spans
from jobs.evaluate.dola import ALPHA, Contrast
from jobs.evaluate.encoding import Encoder, Pair, Request
from jobs.evaluate.generation import Generation, generate
from jobs.evaluate.prefix_tree import Schedule, cut, plan
from jobs.evaluate.scoring import Model, Observer, Scorer, Scores, batch_tokens, text_config
from jobs.models.backbones import CausalLM

_INFINITE = 10**29
DEFAULT_LENGTH = 2048
DEFAULT_NEW_TOKENS = 256


class PrefixLM(LM):  # type: ignore[misc]  # lm-eval is read without types
    """Scores and generates with a causal LM (ours, or any of transformers) under lm-eval's interface.

    `max_length` is the window in tokens (default: the model's). `spans` maps a token sequence to span numbers for
    routers that need them. `share=False` computes every request on its own, which is also what happens with routers
    whose choice depends on other tokens. `tokens_per_batch` 0 = by the size of the vocabulary. `observer` sees every
    pass's routing records. `dola` are layers to contrast the last one with. `computed_tokens` counts what was fed to
    the model, with padding.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        tokens_per_batch: int = 0,
        share: bool = True,
        spans: Spans | None = None,
        observer: Observer | None = None,
        dola: Sequence[int] = (),
    ) -> None:
        super().__init__()
        model.eval()
        self.tokenizer = tokenizer
        self._callee = Model(model, spans, Contrast(model, dola) if dola else None)
        self._generator = Model(model, spans, Contrast(model, dola, ALPHA)) if dola else self._callee
        self._max_length = max_length or window(model, tokenizer)
        self._tokens_per_batch = tokens_per_batch or batch_tokens(len(tokenizer), self.device)
        self._scorer = Scorer(self._callee, observer, self._tokens_per_batch)
        self._share = share and self._callee.cacheable
        self._encoder = Encoder(tokenizer, self.prefix_token_id)

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def device(self) -> torch.device:
        return self._callee.device

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: begin of text, else end of text."""
        bos = self.tokenizer.bos_token_id
        return int(bos if bos is not None else self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def exact(self) -> bool:
        """Whether scores do not depend on the batch but for the last digits: in fp32 they do not."""
        return self._callee.dtype == torch.float32

    @property
    def computed_tokens(self) -> int:
        return self._scorer.tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the tokenizer's own template."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def encode(self, requests: Sequence[Request]) -> list[Pair]:
        """Return (context ids, continuation ids) of each (context, continuation) text pair."""
        return self._encoder.pairs(requests)

    def schedule(self, pairs: Sequence[tuple[ArrayLike, ArrayLike]]) -> Schedule:
        """Return the schedule of token pairs: computed once, it serves any number of models and interventions."""
        rows = 0 if self._callee.cacheable or self._batch_independent() else 1
        requests = [cut(context, continuation, self.max_length) for context, continuation in pairs]
        return plan(requests, share=self._share, tokens_per_batch=self._tokens_per_batch, rows=rows)

    def score(self, schedule: Schedule) -> Scores:
        """Return the scores of a schedule's requests under the model as it is now."""
        return self._scorer.run(schedule)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) of each request's continuation."""
        pairs = self.encode([request.args for request in requests])
        scores = self.score(self.schedule(pairs))
        answers = [(float(v), bool(g)) for v, g in zip(scores.loglikelihood, scores.greedy, strict=True)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in disjoint windows of `max_length` tokens."""
        pairs: list[Pair] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self._encoder.encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for piece in windows:
                context, continuation = make_disjoint_window(piece)
                pairs.append((list(context), list(continuation)))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, value in zip(owner, self.score(self.schedule(pairs)).loglikelihood, strict=True):
            totals[number] += float(value)
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the generated text of each request, up to its first stop sequence."""
        wanted = []
        for request in requests:
            context, settings = request.args
            generation = Generation.of(settings, self.tokenizer.decode([self.eot_token_id]), DEFAULT_NEW_TOKENS)
            room = self.max_length - generation.new_tokens
            if room < 1:
                raise ValueError(f"{generation.new_tokens} new tokens do not fit a window of {self.max_length}")
            wanted.append((self._encoder.encode(context)[-room:], generation))
        # Where a row's route depends on the other rows, each text is generated alone.
        room = self._tokens_per_batch if self._callee.cacheable or self._batch_independent() else 0
        texts = generate(self._generator, self.tokenizer, wanted, room)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _batch_independent(self) -> bool:
        """Whether a row's scores do not depend on the other rows of its batch."""
        if self._callee.by_length:
            return False
        moe = getattr(getattr(self._callee.module, "spec", None), "moe", None)
        return moe is None or moe.choice_group != "batch" or bool(getattr(self._callee.module, "causal", True))


def window(model: torch.nn.Module, tokenizer: object) -> int:
    """Return the model's context length: from its spec or config, else the tokenizer, else 2048."""
    if isinstance(model, CausalLM):
        return model.spec.context
    config = text_config(model)
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        length = getattr(config, name, None)
        if length is not None:
            return int(length)
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length and length < _INFINITE else DEFAULT_LENGTH
