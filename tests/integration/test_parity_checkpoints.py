"""Checkpoints of MoE models: transformers -> ours -> transformers gives the same logits; what differs is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeForCausalLM,
)

from jobs.models import export
from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.models.convert import export_checkpoint, import_checkpoint, load_checkpoint
from jobs.models.sources import open_checkpoint
from jobs.models.weights import canonical_state, load_canonical, weights_sha256
from orchestrator.errors import MoegridError, SourceError
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.public_config import spec_of
from tests import training
from tests.public_models import IDS, SHAPE, VOCAB, olmoe_in

Olmoe = tuple[OlmoeForCausalLM, Path]


@pytest.fixture
def olmoe(tmp_path: Path) -> Olmoe:
    return olmoe_in(tmp_path / "olmoe"), tmp_path / "olmoe"


@torch.no_grad()
def test_an_olmoe_checkpoint_comes_in_trains_and_goes_back(olmoe: Olmoe, tmp_path: Path) -> None:
    reference, folder = olmoe
    model = import_checkpoint(folder).eval()
    torch.testing.assert_close(model(IDS).logits, reference(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    export_checkpoint(model, tmp_path / "same")
    again = OlmoeForCausalLM.from_pretrained(tmp_path / "same").eval()
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), again.parameters(), strict=True))

    with torch.enable_grad():
        model.train()(IDS, labels=IDS).loss.backward()
        torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    export_checkpoint(model, tmp_path / "trained")
    trained = OlmoeForCausalLM.from_pretrained(tmp_path / "trained").eval()
    torch.testing.assert_close(trained(input_ids=IDS).logits, model.eval()(IDS).logits, atol=1e-5, rtol=1e-5)
    assert weights_sha256(import_checkpoint(tmp_path / "trained")) == weights_sha256(model)


@torch.no_grad()
def test_padding_gives_the_logits_of_transformers(olmoe: Olmoe) -> None:
    reference, folder = olmoe
    model = import_checkpoint(folder).eval()
    mask = torch.ones_like(IDS)
    mask[0, 12:] = 0
    ours, theirs = model(IDS, attention_mask=mask), reference(input_ids=IDS, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(ours.logits[real], theirs.logits[real], atol=1e-5, rtol=1e-5)


def test_the_whole_model_has_the_gradients_of_transformers(olmoe: Olmoe) -> None:
    reference, folder = olmoe
    model = import_checkpoint(folder)
    output = model(IDS, labels=IDS)
    (output.loss / output.tokens).backward()
    reference(input_ids=IDS, labels=IDS).loss.backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        public = name.removeprefix("backbone.").replace("mlp.block.router", "mlp.gate")
        public = public.replace("mlp.block.experts.up", "mlp.experts.gate_up_proj")
        expected = theirs[public.replace("mlp.block.experts.down", "mlp.experts.down_proj")].grad
        scale = expected.abs().max().clamp_min(1.0)
        torch.testing.assert_close(parameter.grad / scale, expected / scale, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    "kind, field, value",
    [
        ("olmoe", "hidden_act", "gelu"),
        ("olmoe", "clip_qkv", 0.0),
        ("deepseek", "attention_bias", True),
        ("olmoe", "rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
        ("olmoe", "rope_scaling", {"rope_type": "proportional"}),
        ("olmoe", "rope_scaling", {"type": "linear"}),
        ("olmoe", "rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        ("olmoe", "rope_scaling", {"rope_type": "yarn", "factor": "4"}),
        ("olmoe", "rope_scaling", {"full_attention": {"rope_type": "default"}}),
        ("olmoe", "partial_rotary_factor", 0.5),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("qwen3_moe", "mlp_only_layers", [1]),
        ("qwen2", "use_sliding_window", True),
        ("mixtral", "router_jitter_noise", 0.1),
        ("llama", "hidden_act", "relu"),
        ("llama", "mlp_bias", True),
        ("deepseek", "scoring_func", "sigmoid"),
        ("deepseek", "topk_method", "group_limited_greedy"),
        ("deepseek", "n_group", 4),
        ("deepseek", "q_lora_rank", 8),
        ("deepseek", "moe_layer_freq", 2),
        ("llama", "num_hidden_layers", "2"),
        ("llama", "max_position_embeddings", None),
    ],
)
def test_a_config_that_we_would_compute_otherwise_is_refused(kind: str, field: str, value: object) -> None:
    config = {
        "model_type": kind,
        **SHAPE,
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    }
    spec_of(config)
    with pytest.raises(SourceError, match="cannot be imported") as raised:
        spec_of({**config, field: value})
    assert field in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "said"), [("jetmoe", "MoA"), ("phimoe", "means and biases"), ("gpt2", "known types are")]
)
def test_a_type_that_we_have_not_says_why(kind: str, said: str) -> None:
    with pytest.raises(SourceError, match="cannot be imported") as raised:
        spec_of({"model_type": kind, **SHAPE})
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"backbone": "olmoe"},
        {"backbone": "llama", "expert": "relu_mlp"},
        {"backbone": "llama", "expert": "gelu_mlp_bias"},
        {"backbone": "deepseek_moe", "dense_layers": 1, "dense_width": 40},
        {"backbone": "deepseek_moe", "dense_width": 40},
        {"backbone": "llama"},
    ],
)
def test_a_dense_model_is_exported_as_what_it_computes_or_not_at_all(fields: dict[str, object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = {"hidden_size": 32, "num_layers": 2, "init_std": 0.3, **fields}
    moe = MoESpec(preset="dense", expert_width=16, expert=own.pop("expert", None))  # type: ignore[arg-type]
    model = build_model(ModelSpec(moe=moe, **own), VOCAB).eval()  # type: ignore[arg-type]
    if fields in ({"backbone": "llama"}, {"backbone": "deepseek_moe", "dense_width": 40}):
        export_checkpoint(model, tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(theirs(input_ids=IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(MoegridError, match="no public layout"):
            export_checkpoint(model, tmp_path)


def test_a_checkpoint_trains_with_another_router_of_the_same_shape(olmoe: Olmoe) -> None:
    checkpoint = open_checkpoint(olmoe[1])
    spec = spec_of(checkpoint.config)
    sigmoid = dataclasses.replace(spec, moe=dataclasses.replace(spec.moe, preset="aux_free"))
    model = build_model(sigmoid, VOCAB)
    load_checkpoint(model, checkpoint)
    assert torch.isfinite(model(IDS, labels=IDS).loss)
    with pytest.raises(MoegridError, match="no public layout"):
        export_checkpoint(model, olmoe[1] / "out")


def test_a_trained_state_goes_to_transformers_with_its_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = training.prepare(str(tmp_path / "store"))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(training.VOCABULARY)}, unk_token="w0"))
    blobs = {"tokenizer.json": words.to_str().encode(), "special.json": b'{"eos": "w1"}'}
    tokenizer = training.put(store, "words", "tokenizer", blobs, {"vocab_size": training.VOCABULARY})
    spec = dataclasses.replace(training.MODEL, moe=dataclasses.replace(training.MODEL.moe, preset="olmoe"))
    init = dataclasses.replace(training.init_work(spec), tokenizer=tokenizer)
    (work,) = training.segments([("", 0, 2)], dataclasses.replace(training.TRAIN, steps=2), model=spec)
    work = dataclasses.replace(work, tokenizer=tokenizer, init=init.key())
    training.run_chain(store, [init, work])

    assert export.main(["--store", store.url, "--state", work.key(), str(tmp_path / "out")]) == 0
    (tmp_path / "plain").touch()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, (tmp_path / "plain").stat().st_mode), (
        "others may read what the umask lets them"
    )
    public = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w7")["input_ids"] == [7]
    assert public.config.eos_token_id == public.generation_config.eos_token_id == 1
    manifest = store.artifacts.get(work.key())
    assert manifest is not None
    model = build_model(spec, training.VOCABULARY).eval()
    load_canonical(model, load_file(store.artifacts.fetch(manifest, "weights.safetensors", tmp_path)))
    ids = IDS % training.VOCABULARY
    torch.testing.assert_close(public(input_ids=ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert export.main(["--store", store.url, "--state", init.key(), str(tmp_path / "no")]) != 0
    assert "no training state" in capsys.readouterr().err


def test_a_checkpoint_of_another_shape_is_refused(olmoe: Olmoe, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(olmoe[1])
    spec = spec_of(checkpoint.config)
    wrong = dataclasses.replace(spec, moe=dataclasses.replace(spec.moe, num_experts=4))
    with pytest.raises(MoegridError, match="does not fit"):
        load_checkpoint(build_model(wrong, VOCAB), checkpoint)
    with pytest.raises(SourceError, match="no checkpoint"):
        open_checkpoint(tmp_path / "nowhere")


class DeepseekFeedForward(nn.Module):
    """The 16B model's sparse layer, composed: softmax, greedy top-k, no renormalisation, plus the shared experts."""

    def __init__(self, experts: nn.ModuleList, gate: nn.Parameter, shared: nn.Module, top_k: int) -> None:
        super().__init__()
        self.experts, self.gate, self.shared, self.top_k = experts, gate, shared, top_k

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x, self.gate).softmax(-1)
        values, indices = scores.topk(self.top_k, dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        chosen = outputs.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, x.shape[-1]))
        return (chosen * values.unsqueeze(-1)).sum(-2) + self.shared(x)


def deepseek_in(folder: Path, model: CausalLM) -> dict[str, Tensor]:
    """Write a model as the repository of DeepSeekMoE 16B has it; return its tensors."""
    spec, moe, tensors = model.spec, model.spec.moe, {}
    for name, tensor in canonical_state(model).items():
        layer, _, part = name.removeprefix("backbone.").partition(".mlp.block.")
        if not part:
            tensors[layer] = tensor
        elif part == "router.weight":
            tensors[f"{layer}.mlp.gate.weight"] = tensor
        elif part.startswith("experts."):
            for i, matrix in enumerate(tensor):
                named = {"down": matrix}
                if part == "experts.up":
                    named = {"gate": matrix[: moe.expert_width], "up": matrix[moe.expert_width :]}
                tensors |= {f"{layer}.mlp.experts.{i}.{piece}_proj.weight": value for piece, value in named.items()}
        else:
            group = "shared_experts." if part.startswith("shared.") else ""
            tensors[f"{layer}.mlp.{group}{part.rpartition('.')[2]}_proj.weight"] = tensor
    config = {
        **SHAPE,
        "model_type": "deepseek",
        "num_key_value_heads": 4,
        "max_position_embeddings": spec.context,
        "intermediate_size": spec.dense_width,
        "moe_intermediate_size": moe.expert_width,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_experts,
        "num_experts_per_tok": moe.top_k,
        "first_k_dense_replace": spec.dense_layers,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "rms_norm_eps": spec.norm_eps,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@torch.no_grad()
def test_deepseek_moe_16b_layout_against_a_composed_reference(tmp_path: Path) -> None:
    torch.manual_seed(0)
    moe = MoESpec(preset="deepseek_moe", top_k=3, num_experts=8, expert_width=12)
    spec = ModelSpec(
        backbone="deepseek_moe", hidden_size=32, num_layers=2, init_std=0.3, dense_layers=1, dense_width=40, moe=moe
    )
    tensors = deepseek_in(tmp_path, build_model(spec, VOCAB))
    assert spec_of(open_checkpoint(tmp_path).config).dense_layers == 1
    model = import_checkpoint(tmp_path).eval()
    torch.manual_seed(0)
    assert weights_sha256(model) == weights_sha256(build_model(spec, VOCAB))

    config = LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}, intermediate_size=40, rms_norm_eps=1e-5)
    reference = LlamaForCausalLM(config).eval()

    def mlp(prefix: str) -> nn.Module:
        module = type(reference.model.layers[0].mlp)(config)
        for part in ("gate", "up", "down"):
            getattr(module, f"{part}_proj").weight = nn.Parameter(tensors[f"{prefix}.{part}_proj.weight"])
        return module

    layer = "model.layers.1.mlp"
    sparse = DeepseekFeedForward(
        nn.ModuleList([mlp(f"{layer}.experts.{i}") for i in range(8)]),
        nn.Parameter(tensors[f"{layer}.gate.weight"]),
        mlp(f"{layer}.shared_experts"),
        3,
    )
    reference.model.layers[1].mlp = nn.Identity()
    dense = {name: tensor for name, tensor in tensors.items() if not name.startswith(layer)}
    reference.load_state_dict(dense)
    reference.model.layers[1].mlp = sparse
    torch.testing.assert_close(model(IDS).logits, reference(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
