"""The stages of a checkpoint's tokenizer: it is taken, or another one is refused before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from jobs.models import export
from jobs.models.sources import open_checkpoint
from jobs.node.preemption import Signals
from jobs.run import run_job
from orchestrator.data.tokenizers import tokenizer_sha256
from orchestrator.spec.cell import DataSpec, TokenizerSpec, TrainSpec
from orchestrator.spec.model import Model, ModelSpec
from orchestrator.spec.public_config import spec_of
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.work import Conditions, DataWork, InitWork, TokenizerWork, TokensWork, TrainWork
from orchestrator.store import Store
from tests.integration.stages import run_stages, submit
from tests.tokenizer_families import DEEPSEEK_BOS, DEEPSEEK_EOS, FAMILIES


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """Return a dense checkpoint with a tokenizer of DeepSeek's layout."""
    FAMILIES["deepseek"](tmp_path / "dense")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = len(AutoTokenizer.from_pretrained(tmp_path / "dense"))
    LlamaForCausalLM(LlamaConfig(vocab_size=size, max_position_embeddings=64, **shape)).save_pretrained(
        tmp_path / "dense"
    )
    return tmp_path / "dense"


def tokenizer_of(folder: Path) -> TokenizerWork:
    source = TokenizerSpec(kind="pretrained", source=f"file://{folder}", digest=tokenizer_sha256(folder))
    return TokenizerWork(source, data="")


def model_of(dense: Path) -> Model:
    return resolve_model(dataclasses.replace(spec_of(open_checkpoint(dense).config), checkpoint=f"file://{dense}"))


def test_a_checkpoint_trains_with_its_own_tokenizer_and_goes_out_with_it(dense: Path, tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    rows = [{"prompt": f"Question: what is {i}?", "response": f" Answer: the cat sat {i}."} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataWork(DataSpec(f"file://{tmp_path}/rows.jsonl", format="instruction", holdout=0.2))
    tokenizer = tokenizer_of(dense)
    tokens = TokensWork(data.key(), tokenizer.key(), "instruction", 32)
    model = model_of(dense)
    init = InitWork(model, tokenizer.key())
    train = TrainSpec(data=data.data, steps=2, micro_batch=2, sequence_length=32, freeze="", router_lr=1e-4)
    training = TrainWork(
        model, tokenizer.key(), init.key(), (), Conditions("finetune", train, tokens.key(), seed=0), 0, 2
    )
    manifests = run_stages(store, [data, tokenizer, tokens, init, training])
    assert {name: manifests[1].info[name] for name in ("bos", "eos")} == {"bos": DEEPSEEK_BOS, "eos": DEEPSEEK_EOS}

    assert export.main(["--store", store.url, "--state", training.key(), str(tmp_path / "out")]) == 0
    public = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = AutoTokenizer.from_pretrained(dense).encode(rows[0]["prompt"], add_special_tokens=False)
    assert public.encode(rows[0]["prompt"]) == [public.convert_tokens_to_ids(DEEPSEEK_BOS), *plain]
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.bos_token_id, config.eos_token_id) == (public.bos_token_id, public.eos_token_id)


def test_a_tokenizer_of_the_same_size_that_is_not_the_checkpoints_is_refused(dense: Path, tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    whole = json.loads((other / "tokenizer.json").read_text())
    words = whole["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(whole))
    tokenizer = tokenizer_of(other)
    init = InitWork(model_of(dense), tokenizer.key())
    batch, attempt = submit(store, [tokenizer, init])
    assert run_job(store.url, batch, 0, Signals()) != 0
    failure = json.dumps(store.get_json(f"attempts/{attempt}/failure.json"))
    assert f"tokenizer file://{other} is not that of checkpoint file://{dense}" in failure
    assert "model.foreign_tokenizer: true" in failure
    meant = dataclasses.replace(init, model=dataclasses.replace(init.model, foreign_tokenizer=True))
    run_stages(store, [meant])


def test_a_model_with_fewer_ids_than_its_tokenizer_is_refused(dense: Path, tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    tokenizer = tokenizer_of(dense)
    init = InitWork(resolve_model(ModelSpec(vocab_size=300)), tokenizer.key())
    batch, attempt = submit(store, [tokenizer, init])
    assert run_job(store.url, batch, 0, Signals()) != 0
    failure = json.dumps(store.get_json(f"attempts/{attempt}/failure.json"))
    assert "the model has 300 token ids, its tokenizer 332" in failure
