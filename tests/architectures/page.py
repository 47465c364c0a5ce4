"""docs/architectures.md, every public block with the fields that make it; written by `-m tests.architectures.page`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.architectures.rows import ARCHITECTURES, ROWS, Row

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = f"""# Public MoE blocks

All {len(ARCHITECTURES)} architectures of transformers 5.23 with a mixture of experts, in {len(ROWS)} rows
(settings in brackets), and the fields of `model.moe` that make each block; besides them `num_experts`, `top_k`,
`expert_width` and, of the router's initial weights, `router_init_std`.
`tests/integration/test_architectures.py` gives each of them the weights of a random block of transformers and
compares outputs and the gradients of the input and of every weight, in fp32: they differ by less than 1e-5 of
the largest value, or of 1. `tests/architectures/rows.py` is the table; this page is made of it, with the sizes
of the test where a value is one of the checkpoint (`limit`, `cap`, `routed_scaling`, ...).

transformers' Mixtral, OLMoE, Qwen3-MoE and others compute the router's logits in the model's type, ours are
fp32 always: in bf16 some tokens take other experts.

| block | fields |
|---|---|
"""
NOTES = """
What a row leaves out is what stands around the block:

- JetMoe's attention chooses its heads as experts (MoA); our attention has no such heads.
- Doge's router, as transformers has it, scores a token's keys with other tokens' states: gate
  `product_keys_mixed`, whose results carry `causal=false`. `product_keys` scores each token by itself.
- Phi-3.5-MoE, Mixtral, MiniMax and DBRX: noise in training is off by default (`input_jitter`).
- Switch Transformers on a GPU in bf16 gives the noise to the router alone (`router_jitter`); in fp32
  transformers' router writes it into what the experts see as well (`input_jitter`).
- Muse Spark's and A.X K2's norms are kept as differences from 1 there; DeepSeek V4's table of experts is
  `router.table`.
"""


def written(fields: Mapping[str, object]) -> str:
    """Return fields as one writes them in YAML, in one line."""

    def value(item: object) -> str:
        if isinstance(item, Mapping):
            return "{" + ", ".join(f"{name}: {value(inner)}" for name, inner in item.items()) + "}"
        return item if isinstance(item, str) else json.dumps(item)

    return ", ".join(f"{name}: {value(item)}" for name, item in fields.items())


def lines() -> Iterator[str]:
    for row in ROWS:
        yield f"| {row.id} | `{written(row.fields)}` |"


def skipped() -> Iterator[Row]:
    yield from {row.name: row for row in ROWS if row.skipped}.values()


def page() -> str:
    """Return the page."""
    told = "".join(f"- `{row.name}`: {row.skipped}.\n" for row in skipped())
    return HEAD + "\n".join(lines()) + "\n" + NOTES + told


if __name__ == "__main__":
    PAGE.write_text(page())
