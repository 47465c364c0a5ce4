"""Every public layout trains from `model.checkpoint` alone, forks and resumes bit for bit, and goes back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers

from jobs.models.building import empty_model
from jobs.models.public import export_checkpoint
from jobs.models.roles import parameter_roles
from jobs.models.weights import materialise
from jobs.node.preemption import Preempted
from jobs.train.loop import StepResult, Trainer
from orchestrator.grid.load import load_grid
from orchestrator.spec.cell import BalanceSpec
from orchestrator.spec.resolve import resolve_model
from tests.public_layouts import written
from tests.public_models import IDS
from tests.tokenizer_families import FAMILIES
from tests.training import TRAIN, init_work, prepare, run_chain, segments, state_bits, tensors

NAMES = ("olmoe", "flex_olmo", "mixtral", "granitemoe", "gpt_oss", "qwen2_moe", "qwen3_moe", "glm4_moe")
STEPS = dataclasses.replace(TRAIN, steps=4, expert_dropout=0.0, balance=BalanceSpec(bias_rate=0.0), lr=1e-3)
# Dense ones, made into experts first; more of the layout than its usual row.
UPCYCLED = ("phi3 (longer than its context)",)
EXPERTS = ", model.upcycle: copy, model.moe: {preset: smoe, top_k: 2, num_experts: 4}"
GRID = """
base: finetune
factors: {freeze: [none->router, none]}
set: {pretrain: null, finetune.data: {source: "file://examples.jsonl"}, model.checkpoint: "file://theirs"%s}
"""


@pytest.mark.parametrize("name", [*NAMES, "deepseek_v2", "deepseek_v3", *UPCYCLED])
def test_a_layout_trains_under_a_freeze_schedule_and_goes_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    FAMILIES["gpt2"](tmp_path / "theirs")
    written(name, tmp_path / "theirs", vocab_size=384, initializer_range=0.05)
    (tmp_path / "examples.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{i}?", "response": f"{i}!"}) for i in range(40))
    )
    (tmp_path / "grid.yaml").write_text(GRID % (EXPERTS if name in UPCYCLED else ""))
    cell = load_grid(str(tmp_path / "grid.yaml")).cells[0].cell
    # The texts of the store have no tokenizer with words.
    model = dataclasses.replace(cell.model, foreign_tokenizer=True)
    assert model.checkpoint == f"file://{tmp_path}/theirs"
    roles = {key: role for key, _, role in parameter_roles(empty_model(model, 384))}

    frozen = segments([("", 0, 2), ("router", 2, 4)], STEPS, model=model, phase="finetune", tokens="instructions")
    free = segments([("", 0, 4)], STEPS, model=model, phase="finetune", tokens="instructions")
    straight, other = prepare(str(tmp_path / "straight")), prepare(str(tmp_path / "other"))
    run_chain(straight, [init_work(model), *frozen])
    # The other schedule first; the frozen half then forks from its state at half, and is stopped once.
    run_chain(other, [init_work(model), frozen[0]])
    run_chain(other, free, "a-1")
    original, taken = Trainer.train_step, 0

    def stopped(self: Trainer, requests: tuple[bool, ...], **options: bool) -> StepResult:
        nonlocal taken
        taken += 1
        return original(self, (requests[0] or taken == 1, *requests[1:]), **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        with pytest.raises(Preempted):
            run_chain(other, frozen[1:], "a-2")
    run_chain(other, frozen[1:], "a-3")
    assert state_bits(other, frozen[1].key()) == state_bits(straight, frozen[1].key())

    before, after = (tensors(straight, work.key(), "weights") for work in frozen)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key for key, role in roles.items() if role != "router"} <= changed
    assert not {key for key, role in roles.items() if role == "router"} & changed

    trained = empty_model(model, 384)
    materialise(trained, after)
    trained.eval()
    export_checkpoint(trained, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        theirs, logits = again(input_ids=IDS).logits, trained(IDS).logits
    assert logits is not None
    assert (theirs - logits).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))
    assert resolve_model(model) == model
