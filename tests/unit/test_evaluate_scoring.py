"""Shared prefixes change what is computed, never what comes out."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.data.tokenizer import BOS, EOS, PAD, Vocabulary, train_bpe, transformers_tokenizer
from jobs.evaluate.encoding import Encoder
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.prefix_tree import cut, plan
from jobs.evaluate.scoring import Model, Scorer
from jobs.evaluate.suites.language_model import heldout
from jobs.models.building import build_model
from jobs.moe.interventions import random_routing
from jobs.node.context import StageContext
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.work import EvaluateWork
from tests import training

VOCABULARY = 300


def _model_spec(**moe):
    return resolve_model(
        ModelSpec(
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            context=1024,
            moe=MoESpec(**{"num_experts": 4, "top_k": 2, "expert_width": 16, **moe}),
        )
    )


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(0)
    return build_model(_model_spec(router_init_std=0.5), VOCABULARY).eval()


def _requests(kind, seed=0) -> list[tuple[list[int], list[int]]]:
    generator = random.Random(seed)

    def tokens(most, least=1) -> list[int]:
        return [generator.randrange(VOCABULARY) for _ in range(generator.randint(least, most))]

    def items(context, count, question, choices, answer):
        made = []
        for _ in range(count):
            asked = context + tokens(question)
            made += [(asked, tokens(answer)) for _ in range(choices)]
        return made

    kinds = {
        "choices": lambda: items([], 12, 30, 4, 5),
        "few shots": lambda: [r for _ in range(4) for r in items(tokens(220, 200), 1, 30, 4, 5)],
        "shared shots": lambda: items(tokens(200, 200), 14, 40, 4, 5),
        "subjects": lambda: [r for _ in range(2) for r in items(tokens(150, 150), 4, 80, 4, 1)],
        "alone": lambda: items([], 15, 40, 1, 4),
        "no context": lambda: [([1], tokens(20)) for _ in range(15)],
        "prefix of another": lambda: [([5] * n, [7]) for n in (1, 3, 40, 41, 80)] * 2,
        "long choices": lambda: items(tokens(60, 60), 3, 5, 3, 300),
        "big branches": lambda: [r for _ in range(3) for r in items([9] * 40 + tokens(250, 200), 3, 200, 2, 30)],
    }
    requests = kinds[kind]()
    generator.shuffle(requests)
    return requests


KINDS = (
    "choices",
    "few shots",
    "shared shots",
    "subjects",
    "alone",
    "no context",
    "prefix of another",
    "long choices",
    "big branches",
)


@torch.inference_mode()
def _reference(model, context, continuation, length=1024):
    fed, targets = cut(context, continuation, length)
    logits = model(torch.from_numpy(fed)[None]).logits[0, -len(targets) :]
    values = logits.log_softmax(-1)[torch.arange(len(targets)), torch.from_numpy(targets)]
    return float(values.double().sum()), bool((logits.argmax(-1) == torch.from_numpy(targets)).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "ours"])
def test_scores_are_those_of_whole_sequences(kind, name, request):
    model = request.getfixturevalue(name)
    requests = _requests(kind)
    scores = Scorer(Model(model)).run(plan([cut(*r, 1024) for r in requests]))
    for value, greedy, pair in zip(scores.loglikelihood, scores.greedy, requests, strict=True):
        wanted, exact = _reference(model, *pair)
        assert value == pytest.approx(wanted, abs=1e-4, rel=1e-6)
        assert greedy == exact


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_tokens_are_planned_than_without_sharing(kind):
    requests = [cut(*r, 1024) for r in _requests(kind)]
    assert plan(requests).tokens <= plan(requests, share=False).tokens == sum(len(fed) for fed, _ in requests)


def test_every_prefix_is_computed_once_where_sharing_pays():
    requests = [cut(*r, 1024) for r in _requests("shared shots")]
    distinct = {tuple(fed[: n + 1]) for fed, _ in requests for n in range(len(fed))}
    assert plan(requests).tokens == len(distinct)


def test_a_chunk_of_the_tree_stays_small_however_many_items_share_a_prefix():
    shots = list(range(200))
    requests = [cut([*shots, 250, i, i, i], [j], 1024) for i in range(250) for j in range(2)]
    schedule = plan(requests)
    assert max(len(tree.ids) for batch in schedule.trunks for trunk in batch for tree in trunk.trees) <= 512


def test_long_requests_are_cut_on_the_left_like_the_harness_does(llama):
    requests = [([3] * 90 + [i], [5, i]) for i in range(4)]
    scores = Scorer(Model(llama)).run(plan([cut(*r, 64) for r in requests]))
    for value, pair in zip(scores.loglikelihood, requests, strict=True):
        assert value == pytest.approx(_reference(llama, *pair, length=64)[0], abs=1e-4)
    with pytest.raises(ValueError, match="cannot score"):
        cut([1], [2] * 65, 64)


def test_an_intervention_gives_the_same_scores_shared_or_alone(ours):
    requests = [cut(*r, 1024) for r in _requests("few shots")]
    scorer = Scorer(Model(ours))
    with random_routing(ours, 3):
        shared = scorer.run(plan(requests)).loglikelihood
        alone = scorer.run(plan(requests, share=False)).loglikelihood
    assert shared == pytest.approx(alone, abs=1e-4)
    assert np.abs(scorer.run(plan(requests)).loglikelihood - shared).max() > 1e-3


def test_observed_routing_counts_every_real_token_once(ours):
    requests = [cut(*r, 1024) for r in _requests("few shots")]
    tokens = []

    def observe(routings, real):
        assert len(routings) == 2
        tokens.append(int(real.sum()))
        for routing in routings:
            assert int(routing.expert_counts().sum()) == 2 * int(real.sum())

    schedule = plan(requests)
    Scorer(Model(ours), observe).run(schedule)
    assert sum(tokens) == schedule.tokens


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    text = "Question: Which of the following is right? Answer: the quick brown fox isn't over 25 lazy dogs.\n\n"
    (directory / "tokenizer.json").write_text(train_bpe(iter([text] * 5), VOCABULARY).to_str())
    (directory / "special.json").write_text(json.dumps({"bos": BOS, "eos": EOS, "pad": PAD}))
    return directory


TEXTS = [
    "The quick",
    " brown fox",
    "\n\nQuestion: a b",
    " ",
    "isn't 25",
    "  two",
    "é–…",
    "日本",
    BOS,
    "Answer:",
    "\t",
    "x",
]


def test_pairs_are_encoded_as_the_harness_encodes_them(tokenizer_directory):
    tokenizer = transformers_tokenizer(tokenizer_directory)
    encoder = Encoder(tokenizer, tokenizer.bos_token_id)
    assert encoder._backend is not None
    generator = random.Random(0)
    requests = []
    for _ in range(400):
        context = "".join(generator.choices(TEXTS, k=generator.randint(0, 8)))
        requests.append((context, generator.choice([" ", "", "\n"]) + generator.choice(["fox", "a b c", "25.", "é"])))
    for (context, continuation), (left, right) in zip(requests, encoder.pairs(requests), strict=True):
        if context == "":
            assert (left, right) == ([tokenizer.bos_token_id], tokenizer.encode(continuation))
            continue
        spaces = len(context) - len(context.rstrip())
        if spaces:
            continuation, context = context[-spaces:] + continuation, context[:-spaces]
        whole, before = tokenizer.encode(context + continuation), tokenizer.encode(context)
        assert (left, right) == (before, whole[len(before) :])


class _Request:
    def __init__(self, *args):
        self.args = args


@pytest.mark.parametrize("name", ["llama", "ours"])
def test_rolling_likelihood_covers_every_token_once(name, request, tokenizer_directory):
    model, tokenizer = request.getfixturevalue(name), transformers_tokenizer(tokenizer_directory)
    text = "The quick brown fox. " * 12
    (whole,) = PrefixLM(model, tokenizer).loglikelihood_rolling([_Request(text)])
    ids = tokenizer.encode(text)
    assert whole == pytest.approx(_reference(model, [tokenizer.bos_token_id], ids)[0], abs=1e-3)
    (cut_up,) = PrefixLM(model, tokenizer, max_length=16).loglikelihood_rolling([_Request(text)])
    pieces = [ids[at : at + 16] for at in range(0, len(ids), 16)]
    firsts = [tokenizer.bos_token_id, *(piece[-1] for piece in pieces[:-1])]
    wanted = 0.0
    for first, piece in zip(firsts[:-1], pieces[:-1], strict=True):
        wanted += _reference(model, [first], piece)[0]
    # The last window is filled up with the context before it.
    wanted += _reference(model, ids[-17 : -len(pieces[-1])], pieces[-1], length=16)[0]
    assert cut_up == pytest.approx(wanted, abs=1e-3)


def test_greedy_generation_is_that_of_transformers(llama, tokenizer_directory):
    tokenizer = transformers_tokenizer(tokenizer_directory)
    contexts = ["The quick", "Question: which is right? Answer:", "x"]
    settings = {"until": [], "do_sample": False, "max_gen_toks": 12}
    texts = PrefixLM(llama, tokenizer).generate_until([_Request(c, settings) for c in contexts])
    for context, text in zip(contexts, texts, strict=True):
        ids = torch.tensor([tokenizer.encode(context)])
        out = llama.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=VOCABULARY)
        assert text == tokenizer.decode(out[0, ids.shape[1] :]).split(EOS)[0]


@pytest.mark.parametrize("name", ["llama", "ours"])
def test_a_prefix_that_contexts_share_is_computed_once(name, request, tokenizer_directory):
    model, tokenizer = request.getfixturevalue(name), transformers_tokenizer(tokenizer_directory)
    fed = []
    shots = ["The quick brown fox jumps over the lazy dog. " * 6, "Question: which is right? Answer: the second. " * 5]
    contexts = [f"{shot}{end}" for shot in shots for end in ("Which", "x", "Question: a fox?", "Answer: 25.", "Which")]
    contexts += ["The quick", "The quick brown fox jumps over"]
    settings = {"until": [], "do_sample": False, "max_gen_toks": 9}
    wanted = [PrefixLM(model, tokenizer).generate_until([_Request(c, settings)])[0] for c in contexts]

    def count(_, args, named):
        fed.append((named["input_ids"] if "input_ids" in named else args[0]).numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        assert PrefixLM(model, tokenizer).generate_until([_Request(c, settings) for c in contexts]) == wanted
    finally:
        handle.remove()
    length = [len(tokenizer.encode(context)) for context in (*shots, *contexts)]
    prefixes, longest = length[0] + length[1], max(length[2:7]) - length[0]
    # Each prefix once, the ends of its contexts padded to the longest, the two that share nothing, the new tokens.
    assert sum(fed) <= prefixes + 10 * (longest + 4) + 2 * 24 + len(contexts) * 9


@pytest.mark.parametrize("unit", ["token", "word"])
def test_generation_stops_and_does_not_depend_on_the_batch(unit, tokenizer_directory):
    torch.manual_seed(1)
    tokenizer = transformers_tokenizer(tokenizer_directory)
    model = build_model(_model_spec(unit=unit), len(tokenizer)).eval()
    tables = Vocabulary.load(tokenizer_directory).span_tables()
    spans = (lambda ids: tables.spans(ids)[0]) if unit == "word" else None
    lm = PrefixLM(model, tokenizer, spans=spans)
    contexts = ["The quick", "Question: which is right? Answer: the", "x"]
    sampled = {"until": [" "], "do_sample": True, "temperature": 1.0, "seed": 4, "max_gen_toks": 8}
    together = lm.generate_until([_Request(c, {"max_gen_toks": 8}) for c in contexts])
    alone = [lm.generate_until([_Request(c, {"max_gen_toks": 8})])[0] for c in contexts]
    assert together == alone
    assert all(" " not in text for text in lm.generate_until([_Request(c, sampled) for c in contexts]))


def test_a_router_of_words_is_scored_on_whole_sequences(tokenizer_directory):
    torch.manual_seed(2)
    tokenizer = transformers_tokenizer(tokenizer_directory)
    model = build_model(_model_spec(unit="word", router_init_std=0.5), len(tokenizer)).eval()
    tables = Vocabulary.load(tokenizer_directory).span_tables()
    lm = PrefixLM(model, tokenizer, spans=lambda ids: tables.spans(ids)[0])
    pairs = lm.encode([("The quick brown", f" {word}") for word in ("fox", "dogs", "lazy fox", "Question")])
    schedule = lm.schedule(pairs)
    assert schedule.tokens == sum(len(cut(*pair, 1024)[0]) for pair in pairs)
    for value, pair in zip(lm.score(schedule).loglikelihood, pairs, strict=True):
        fed, targets = cut(*pair, 1024)
        spans = torch.from_numpy(tables.spans(fed)[0])[None]
        with torch.inference_mode():
            logits = model(torch.from_numpy(fed)[None], spans=spans).logits[0, -len(targets) :].log_softmax(-1)
        wanted = float(logits[torch.arange(len(targets)), torch.from_numpy(targets)].sum())
        assert value == pytest.approx(wanted, abs=1e-4)


def test_a_router_that_looks_at_the_whole_batch_generates_each_text_alone(tokenizer_directory):
    torch.manual_seed(0)
    tokenizer = transformers_tokenizer(tokenizer_directory)
    spec = _model_spec(preset="expert_choice", choice_group="batch", router_init_std=1.0)
    model = build_model(dataclasses.replace(spec, init_std=0.5), len(tokenizer)).eval()
    lm = PrefixLM(model, tokenizer, max_length=256)
    requests = [_Request(context, {"max_gen_toks": 6}) for context in ("The quick", "Answer: the", "x", "which is")]
    alone = [lm.generate_until([request])[0] for request in requests]
    assert lm.generate_until(requests) == alone


def test_without_pretraining_text_the_heldout_responses_are_scored(tmp_path):
    store = training.prepare(str(tmp_path))
    examples = [([5, 6, 7], [8, 9, 1]), ([4], [3, 1]), ([2, 2], [1])]  # 1 ends a text; the last response is empty
    arrays = {
        "tokens": np.array([t for prompt, response in examples for t in prompt + response], dtype=np.uint16),
        "offsets": np.cumsum([0, *(len(prompt + response) for prompt, response in examples)]),
        "loss_mask": np.concatenate([[False] * len(p) + [True] * len(r) for p, r in examples]),
    }
    blobs = {f"heldout_{name}.npy": training._npy(array) for name, array in arrays.items()}
    tokens = training.put(store, "heldout", "tokens", blobs, {"pad": 0})
    context = StageContext(training.make_job(store, []), tokens, "lm")
    work = EvaluateWork("lm", tokens, resolve_model(ModelSpec()), tokens, items="", tokens=tokens, max_length=3)

    class Words:
        def decode(self, ids):
            return " ".join(f"w{i}" for i in ids)

    first, second = heldout(context, work, Words())
    assert [[list(map(int, ids)) for ids in piece] for piece in first.pieces] == [[[6, 7, 8], [8, 9]]]
    assert [[list(map(int, ids)) for ids in piece] for piece in second.pieces] == [[[4], [3]]]
    assert (first.size, second.size) == (5, 2)
