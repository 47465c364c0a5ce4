"""Dense checkpoints: a Llama folder or GGUF file comes in, and a model upcycled from one starts as itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from jobs.models.convert import import_checkpoint
from jobs.models.sources import open_checkpoint
from jobs.models.upcycle import initial_model, upcycle
from orchestrator.data.pinning import pin_checkpoint
from orchestrator.errors import MoegridError, SourceError
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.public_config import spec_of
from tests.public_models import IDS, VOCAB, llama_in, olmoe_in


@pytest.fixture
def llama(tmp_path: Path) -> tuple[LlamaForCausalLM, Path]:
    return llama_in(tmp_path / "llama"), tmp_path / "llama"


def sparse_spec(folder: Path, **moe: object) -> ModelSpec:
    dense = spec_of(open_checkpoint(folder).config)
    fields: dict[str, Any] = {"num_experts": 4, "top_k": 2, "expert_width": 48, **moe}
    sparse = MoESpec(preset="smoe", **fields)
    return dataclasses.replace(dense, checkpoint=str(folder), upcycle="copy", moe=sparse)


@torch.no_grad()
def test_a_copied_dense_model_starts_with_its_own_logits(llama: tuple[LlamaForCausalLM, Path]) -> None:
    reference, folder = llama
    expected = reference(input_ids=IDS).logits
    torch.testing.assert_close(import_checkpoint(folder).eval()(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    model = initial_model(sparse_spec(folder), VOCAB).eval()
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(model.moe_blocks) == 2
    router = model.moe_blocks[0].router.weight
    assert torch.equal(router, initial_model(sparse_spec(folder), VOCAB).moe_blocks[0].router.weight)
    assert not torch.equal(router, initial_model(sparse_spec(folder), VOCAB, seed=1).moe_blocks[0].router.weight)
    assert 0.01 < router.std() < 0.03


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_heads": 2, "num_kv_heads": 1},
        {"rope_theta": 5e5},
        {"norm_eps": 1e-2},
        {"tie_embeddings": False},
        {"backbone": "olmoe"},
        {"num_layers": 3},
        {"dense_layers": 1, "dense_width": 40},
    ],
)
@pytest.mark.parametrize("how", ["copy", ""])
def test_a_checkpoint_that_would_mean_something_else_is_refused(
    llama: tuple[LlamaForCausalLM, Path], how: str, wrong: dict[str, Any]
) -> None:
    _, folder = llama
    spec = sparse_spec(folder) if how else dataclasses.replace(spec_of(open_checkpoint(folder).config))
    spec = dataclasses.replace(spec, checkpoint=str(folder), upcycle=how, **wrong)
    with pytest.raises(MoegridError, match="does not fit the model"):
        initial_model(spec, VOCAB)


def test_upcycling_needs_a_dense_checkpoint(llama: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    spec = sparse_spec(llama[1])
    with pytest.raises(MoegridError, match="needs a checkpoint"):
        initial_model(dataclasses.replace(spec, checkpoint=""), VOCAB)
    olmoe_in(tmp_path / "olmoe")
    sparse = spec_of(open_checkpoint(tmp_path / "olmoe").config)
    with pytest.raises(MoegridError, match="starts from a dense one"):
        initial_model(dataclasses.replace(sparse, checkpoint=str(tmp_path / "olmoe"), upcycle="copy"), VOCAB)


def test_a_checkpoint_that_has_changed_since_the_plan_is_refused(llama: tuple[LlamaForCausalLM, Path]) -> None:
    spec = pin_checkpoint(sparse_spec(llama[1]), llama[1])
    initial_model(spec, VOCAB)
    (llama[1] / "config.json").write_text((llama[1] / "config.json").read_text() + " ")
    with pytest.raises(MoegridError, match="has changed"):
        initial_model(spec, VOCAB)


@torch.no_grad()
def test_partial_and_shared_upcycling_keep_what_they_promise(llama: tuple[LlamaForCausalLM, Path]) -> None:
    reference, folder = llama
    gate = reference.model.layers[0].mlp.gate_proj.weight
    dense = import_checkpoint(folder)
    spec = dataclasses.replace(sparse_spec(folder), upcycle="partial")
    partial = upcycle(dense, spec).moe_blocks[0].experts.up[:, :48]
    kept = (partial == gate).all(-1).sum(-1)
    assert kept.tolist() == [24] * 4
    assert not torch.equal(partial[0], partial[1])
    assert abs(float(partial.std() / gate.std()) - 1) < 0.1

    spec = dataclasses.replace(sparse_spec(folder, shared_experts=1), upcycle="shared_only")
    model = upcycle(dense, spec)
    assert torch.equal(model.moe_blocks[0].shared.gate, gate)
    assert not (model.moe_blocks[0].experts.up[:, :48] == gate).any()

    segments = upcycle(dense, sparse_spec(folder, expert_width=24)).moe_blocks[0].experts.up[:, :24]
    assert torch.equal(segments[0], gate[:24])
    assert torch.equal(segments[1], gate[24:])
    assert torch.equal(segments[2], gate[:24])
    with pytest.raises(MoegridError, match="does not divide"):
        upcycle(dense, sparse_spec(folder, expert_width=36))


@torch.no_grad()
def test_a_gguf_file_gives_the_logits_of_the_model_that_it_holds(llama: tuple[LlamaForCausalLM, Path]) -> None:
    from gguf import GGUFWriter

    reference, folder = llama
    path = folder / "model.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip

    def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
        """Order a head's rows as GGUF does: rotary pairs side by side."""
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    for name, tensor in reference.state_dict().items():
        value = tensor.numpy()
        if name == "lm_head.weight":
            continue  # tied
        if name.startswith("model.layers."):
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            if names[part] in ("attn_q", "attn_k"):
                value = interleave(value, 4 if part.endswith("q_proj") else 2)
            writer.add_tensor(f"blk.{layer}.{names[part]}.weight", np.ascontiguousarray(value))
        else:
            top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
            writer.add_tensor(top[name], value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = import_checkpoint(path).eval()
    torch.testing.assert_close(model(IDS).logits, reference(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "tensor", "said"),
    [
        ("llama.rope.scaling.type", "linear", "", "llama.rope.scaling.type 'linear'"),
        ("llama.rope.scale_linear", 4.0, "", "llama.rope.scale_linear 4.0"),
        ("", "", "rope_freqs.weight", "its positions are stretched"),
        ("", "", "blk.0.attn_q.bias", "blk.0.attn_q.bias is no part of a Llama"),
    ],
)
def test_a_gguf_file_that_would_compute_something_else_is_refused(
    tmp_path: Path, key: str, value: str | float, tensor: str, said: str
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if isinstance(value, float):
        writer.add_float32(key, value)
    elif key:
        writer.add_string(key, value)
    writer.add_tensor(tensor or "output_norm.weight", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError) as raised:
        open_checkpoint(tmp_path / "model.gguf")
    assert said in str(raised.value)
