"""Vision encoders compute what the public ones do, from their checkpoints: transformers' classes, and a graph's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from jobs.models.vision.checkpoints import encoder_weights
from jobs.models.vision.encoder import build_encoder
from jobs.models.vision.onnx_file import OnnxWeights
from orchestrator.catalog.encoders import ENCODERS
from orchestrator.errors import MoegridError, SourceError
from orchestrator.spec.vision import EncoderSpec
from tests.onnx_files import graph_of

SMALL = EncoderSpec(
    image_size=20, patch_size=4, positions=5, hidden_size=24, num_layers=2, num_heads=3, width=48, checkpoint=""
)


def transformers_model(name: str) -> nn.Module:
    """Return a small public encoder whose weights are all drawn, biases and scales too."""
    import transformers

    torch.manual_seed(0)
    common = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 4, "image_size": 20}
    if name == "dinov2":
        config = transformers.Dinov2Config(**common, mlp_ratio=2, layerscale_value=0.5)
        model = transformers.Dinov2Model(config)
    else:
        config = transformers.SiglipVisionConfig(**common, intermediate_size=48)
        model = transformers.SiglipVisionModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def public(name: str, folder: Path) -> tuple[nn.Module, EncoderSpec]:
    model = transformers_model(name)
    model.save_pretrained(folder)
    return model, dataclasses.replace(SMALL, encoder=name, checkpoint=f"file://{folder}")


@pytest.mark.parametrize("name", ["dinov2", "siglip"])
@pytest.mark.parametrize("size", [20, 12])
def test_an_encoder_computes_what_transformers_class_does(name: str, size: int, tmp_path: Path) -> None:
    theirs, spec = public(name, tmp_path)
    ours = build_encoder(spec).eval()
    pixels = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8)
    with torch.no_grad():
        wanted = (
            theirs(ours.normalised(pixels), interpolate_pos_encoding=True)
            if name == "siglip"
            else theirs(ours.normalised(pixels))
        )
        features, routings = ours(pixels)
    patches = wanted.last_hidden_state[:, int(ENCODERS.get(name).class_token) :]
    assert features.shape == patches.shape
    assert (features - patches).abs().max() <= 1e-5 * patches.abs().max()
    assert not routings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpolated_positions_learn_as_torchs_do_without_its_kernel(dtype: torch.dtype) -> None:
    """The kernel's gradient is not deterministic on a GPU: under deterministic algorithms it is an error there."""
    encoder = build_encoder(SMALL)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        own = encoder._positions((3, 7))
    kernels, rest = set(), [own.grad_fn]
    while rest:
        if (node := rest.pop()) is not None:
            kernels.add(node.name())
            rest += [before for before, _ in node.next_functions]
    assert not [name for name in kernels if name.startswith("Upsample")]
    square = encoder.positions[1:].view(1, 5, 5, 24).permute(0, 3, 1, 2)
    wanted = F.interpolate(square, size=(3, 7), mode="bicubic", align_corners=False).flatten(2)[0].t()
    assert (own - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    into = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    found, given = (torch.autograd.grad(one, encoder.positions, into)[0] for one in (own, wanted))
    assert (found - given).abs().max() <= 1e-6 * given.abs().max()


@pytest.mark.parametrize("name", ["dinov2", "siglip"])
def test_pixels_are_normalised_as_the_public_processor_does(name: str) -> None:
    import transformers

    processor = {"dinov2": "BitImageProcessor", "siglip": "SiglipImageProcessor"}[name]
    own = getattr(transformers, f"{processor}Pil", None) or getattr(transformers, processor)
    kind, pixels = ENCODERS.get(name), torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
    made = own(do_resize=False, do_center_crop=False, image_mean=kind.mean, image_std=kind.std)
    wanted = torch.as_tensor(made(pixels.numpy(), return_tensors="pt")["pixel_values"][0])
    ours = build_encoder(dataclasses.replace(SMALL, encoder=name)).normalised(pixels[None])[0]
    assert torch.allclose(ours, wanted, atol=1e-6)


def test_another_shape_is_said_field_by_field(tmp_path: Path) -> None:
    _, spec = public("dinov2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoegridError, match="does not fit") as error:
        build_encoder(spec)
    assert error.value.cause == "vision.num_heads is 3, not 4"


def test_an_encoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    _, spec = public("siglip", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "clip_vision_model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoegridError, match="clip_vision_model"):
        build_encoder(spec)


def test_a_graph_gives_the_weights_that_its_module_has(tmp_path: Path) -> None:
    # As torch exports a module: matrices nameless and transposed, positions as two nameless constants.
    _, spec = public("dinov2", tmp_path)
    path = tmp_path / "encoder.onnx"
    path.write_bytes(graph_of(load_file(tmp_path / "model.safetensors")))
    wanted = dict(encoder_weights(spec))
    found = dict(encoder_weights(dataclasses.replace(spec, checkpoint=str(path))))
    own = build_encoder(dataclasses.replace(spec, checkpoint=""))
    assert found.keys() == wanted.keys() == own.state_dict().keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("cut", [3, 1000, -7])
def test_a_damaged_graph_is_said(cut: int, tmp_path: Path) -> None:
    _, spec = public("dinov2", tmp_path)
    path = tmp_path / "encoder.onnx"
    path.write_bytes(graph_of(load_file(tmp_path / "model.safetensors"))[:cut])
    with pytest.raises(SourceError, match=r"encoder\.onnx is no ONNX file"):
        build_encoder(dataclasses.replace(spec, checkpoint=str(path)))


def test_a_graph_of_something_else_is_said(tmp_path: Path) -> None:
    path = tmp_path / "picture.onnx"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    with pytest.raises(SourceError, match=r"picture\.onnx is no ONNX file"):
        OnnxWeights(path)
