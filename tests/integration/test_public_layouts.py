"""Public layouts: what transformers writes is read by its config alone, computes the same, and goes back."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.prefix_tree import cut, plan
from jobs.evaluate.scoring import Model, Scorer
from jobs.models.convert import export_checkpoint, import_checkpoint
from jobs.models.weights import weights_sha256
from orchestrator.errors import MoegridError, SourceError
from orchestrator.plan.cost import parameters
from orchestrator.spec.public_config import spec_of
from orchestrator.spec.resolve import resolve_model
from tests.public_layouts import COMMON, LAYOUTS, written
from tests.public_models import IDS, VOCAB
from tests.tokenizer_families import FAMILIES


@torch.no_grad()
def difference(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    """Return the largest difference, relative to the largest value where that is above 1."""
    assert ours is not None
    assert theirs is not None
    return float((ours - theirs).abs().max() / max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_a_public_checkpoint_comes_in_and_goes_back(name: str, tmp_path: Path) -> None:
    reference = written(name, tmp_path / "theirs")
    expected = reference(input_ids=IDS).logits

    model = import_checkpoint(tmp_path / "theirs").eval()
    assert difference(model(IDS).logits, expected) <= 1e-5
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    counted = parameters(resolve_model(spec_of(config)), VOCAB)
    assert counted.total == sum(parameter.numel() for parameter in reference.parameters())

    export_checkpoint(model, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert difference(again(input_ids=IDS).logits, expected) <= 1e-5
    assert weights_sha256(import_checkpoint(tmp_path / "ours")) == weights_sha256(model)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
@torch.no_grad()
def test_without_shared_experts_their_empty_matrices_are_passed_over(name: str, tmp_path: Path) -> None:
    expected = written(name, tmp_path, n_shared_experts=0)(input_ids=IDS).logits
    model = import_checkpoint(tmp_path).eval()
    assert all(block.shared is None for block in model.moe_blocks)
    assert difference(model(IDS).logits, expected) <= 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_config_leaves_out_is_what_its_class_takes(name: str, tmp_path: Path) -> None:
    family, own = LAYOUTS[name]
    kind = getattr(transformers, f"{family}Config")
    kind(**copy.deepcopy({**COMMON, **own})).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    compared = 0
    for left_out in set(written) - {"model_type"}:
        given = {key: value for key, value in written.items() if key != left_out}
        try:
            ours = spec_of(given)
        except SourceError:  # a size that every config.json has
            continue
        assert ours == spec_of(kind(**copy.deepcopy(given)).to_dict()), left_out
        compared += 1
    assert compared > 10


@pytest.mark.parametrize(
    "name", ("qwen3_moe", "gpt_oss", "mistral (windows)", "glm4_moe", "deepseek_v2", "deepseek_v3")
)
@torch.no_grad()
def test_a_cache_and_padding_agree_with_transformers(name: str, tmp_path: Path) -> None:
    reference = written(name, tmp_path)
    model = import_checkpoint(tmp_path).eval()
    real = torch.ones_like(IDS)
    real[0, :4] = 0  # on the left, as generation pads
    places = (real.cumsum(1) - 1).clamp_min(0)
    theirs = reference(input_ids=IDS, attention_mask=real, position_ids=places).logits
    seen = real.bool()
    whole = model(IDS, attention_mask=real, position_ids=places).logits
    assert difference(whole[seen], theirs[seen]) <= 1e-5
    parts, cache = [], None
    for start, stop in ((0, 7), (7, 8), (8, 13), (13, IDS.shape[1])):
        part = model(
            IDS[:, start:stop],
            attention_mask=real[:, :stop],
            position_ids=places[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = part.past_key_values
        parts.append(part.logits)
    assert difference(torch.cat(parts, 1)[seen], theirs[seen]) <= 1e-5


@pytest.mark.parametrize("name", ["gpt_oss", "mistral (windows)", "glm4_moe", "deepseek_v3"])
@torch.no_grad()
def test_rows_behind_a_shared_prefix_are_as_alone(name: str, tmp_path: Path) -> None:
    written(name, tmp_path)
    model = import_checkpoint(tmp_path).eval()
    prefix, first, second = IDS[:1, :9], IDS[:1, 9:14], IDS[1:, 9:14]
    both = torch.cat([first, second])
    alone = model(torch.cat([prefix.expand(2, -1), both], 1)).logits
    cache = model(prefix, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    parts = [model(both[:, cut], past_key_values=cache, use_cache=True).logits for cut in (slice(0, 3), [3], [4])]
    assert difference(torch.cat(parts, 1), alone[:, 9:]) <= 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_packed_scores_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = written(name, tmp_path)
    generator = np.random.default_rng(0)
    shots = generator.integers(VOCAB, size=50)
    ends = [generator.integers(VOCAB, size=size) for size in (4, 4, 9, 30)]
    requests = [cut(np.concatenate([shots, end]), end[::-1][:3], 90) for end in ends]
    callee = Model(import_checkpoint(tmp_path).eval())
    assert callee.packs == ("longer than its context" not in name), "whose positions depend on the whole length"
    schedule = plan(requests) if callee.packs else plan(requests, share=False, rows=1)
    found = Scorer(callee).run(schedule).loglikelihood
    for value, (fed, targets) in zip(found, requests, strict=True):
        logprobs = reference(input_ids=torch.from_numpy(fed)[None]).logits[0, -len(targets) :].log_softmax(-1)
        assert value == pytest.approx(float(logprobs[torch.arange(len(targets)), targets].sum()), abs=1e-4)


@torch.no_grad()
def test_rows_on_both_sides_of_an_original_context_are_scored_apart(tmp_path: Path) -> None:
    """In one batch the longest row would decide how the positions of the short ones turn."""
    reference = written("phi3 (longer than its context)", tmp_path / "model")
    FAMILIES["gpt2"](tmp_path / "words")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "words")
    lm = PrefixLM(import_checkpoint(tmp_path / "model"), tokenizer, max_length=40)
    generator = np.random.default_rng(0)
    pairs = [(generator.integers(VOCAB, size=length), generator.integers(VOCAB, size=3)) for length in (4, 6, 30, 8)]
    found = lm.score(lm.schedule(pairs)).loglikelihood
    for value, (context, answer) in zip(found, pairs, strict=True):
        fed = torch.from_numpy(np.concatenate([context, answer]))
        logprobs = reference(input_ids=fed[None, :-1]).logits[0, -3:].log_softmax(-1)
        assert value == pytest.approx(float(logprobs[torch.arange(3), fed[-3:]].sum()), abs=1e-4)


def test_a_model_within_its_original_context_shares_prefixes(tmp_path: Path) -> None:
    written("phi3 (within its original context)", tmp_path)
    model = import_checkpoint(tmp_path).eval()
    assert (model.by_length, model.causal, model.cacheable) == (False, True, True)
    written("phi3 (longer than its context)", tmp_path)
    model = import_checkpoint(tmp_path).eval()
    assert (model.by_length, model.causal, model.cacheable) == (True, False, False)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"long_factor": "1.5"}, "rope_parameters.long_factor is '1.5'"),
        ({"short_factor": [1.0, "x"]}, r"rope_parameters.short_factor is \[1.0, 'x'\]"),
        ({"short_factor": None}, "rope_parameters.short_factor is None"),
        ({"rope_type": "llama3"}, "rope_parameters.low_freq_factor is None"),
    ],
)
def test_what_is_wrong_with_stretched_positions_is_named(fields: dict[str, object], said: str, tmp_path: Path) -> None:
    written("phi3 (longer than its context)", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"factor": 4.0, **config["rope_parameters"], **fields}
    with pytest.raises(SourceError) as raised:
        spec_of(config)
    assert re.search(said, raised.value.cause)


def test_the_first_name_of_longrope_is_read_as_it(tmp_path: Path) -> None:
    written("phi3 (longer than its context)", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    now = spec_of(config)
    config["rope_scaling"] = {**config.pop("rope_parameters"), "type": "su"}
    del config["rope_scaling"]["rope_type"]
    config["rope_theta"] = config["rope_scaling"].pop("rope_theta")
    assert spec_of(config) == now


def test_a_fused_matrix_of_another_height_is_refused(tmp_path: Path) -> None:
    written("phi3 (longer than its context)", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    save_file({**tensors, name: torch.cat([tensors[name]] * 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoegridError, match="does not fit the model") as raised:
        import_checkpoint(tmp_path)
    assert f"{name} has shape (192, 48)" in raised.value.cause


@torch.no_grad()
def test_keys_of_a_shared_prefix_are_made_of_its_latents_once_a_token(tmp_path: Path) -> None:
    written("deepseek_v3", tmp_path)
    model = import_checkpoint(tmp_path).eval()
    cache = model(IDS[:1, :9], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    made: list[int] = []
    layer = next(module for module in model.modules() if hasattr(module, "kv_b_proj"))
    layer.kv_b_proj.register_forward_pre_hook(lambda _, args: made.append(args[0].shape[:-1].numel()))
    model(IDS[:, 9:10], past_key_values=cache, use_cache=True)
    assert sum(made) == 9 + 2, "tokens of the prefix once, of each row its own"


@pytest.mark.parametrize("name", ("gpt_oss", "deepseek_v3", "glm4_moe"))
def test_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = written(name, tmp_path)
    model = import_checkpoint(tmp_path)
    output = model(IDS, labels=IDS)
    assert output.loss is not None
    (output.loss / output.tokens).backward()
    reference(input_ids=IDS, labels=IDS).loss.backward()
    theirs = dict(reference.named_parameters())
    compared = 0
    for key, parameter in model.named_parameters():
        public = theirs.get(key.removeprefix("backbone.").replace("sinks.weight", "sinks"))
        if public is None or public.shape != parameter.shape or public.grad is None:
            continue
        assert parameter.grad is not None
        scale = public.grad.abs().max().clamp_min(1.0)
        torch.testing.assert_close(parameter.grad / scale, public.grad / scale, atol=1e-5, rtol=0, msg=key)
        compared += 1
    assert compared > 20


def test_trees_of_continuations_see_the_same_window(tmp_path: Path) -> None:
    """Two continuations of one trunk in one row, as scoring lays them out: each as if it stood alone."""
    written("gpt_oss", tmp_path)
    model = import_checkpoint(tmp_path).eval()
    trunk, first, second = IDS[:1, :8], IDS[:1, 8:12], IDS[1:, 8:12]
    alone = [model(torch.cat([trunk, part], 1)).logits for part in (first, second)]
    cache = model(trunk, use_cache=True).past_key_values
    seen = torch.zeros(1, 1, 8, 16, dtype=torch.bool)
    seen[..., :8] = True
    seen[..., :4, 8:12] = seen[..., 4:, 12:] = torch.ones(4, 4, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    places = torch.arange(8, 12).repeat(2)[None]
    both = model(
        torch.cat([first, second], 1), attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
    ).logits
    assert both is not None
    for part, whole in zip(both.split(4, dim=1), alone, strict=True):
        assert whole is not None
        assert difference(part, whole[:, 8:]) <= 1e-5
