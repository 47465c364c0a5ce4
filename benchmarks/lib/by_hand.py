"""What a user writes without this project for the cells of `quickstart`: Trainer and stock lm-eval, one script.

    python benchmarks/lib/by_hand.py DATA OUT [--from-scratch] [--threads 1]

DATA holds text, instructions and items as plain files. The base is trained once and fine-tuned per cell, all in one
process, so that imports, tokenizer and tokens are paid once; `--from-scratch` trains it again for each cell.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pyarrow.parquet as pq
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

LENGTH = 256
FREEZE = ("none", "router", "none->router")
SHOTS = {"arc_easy": 3, "arc_challenge": 3, "piqa": 0}
ITEMS = 25
HELD_OUT_TOKENS = 16384


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of 4,096 pieces."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|eos|>"]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>", model_max_length=512
    )


def blocks(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[dict[str, list[int]]]:
    """Return rows of LENGTH tokens of the texts joined by the end token."""
    joined = [token for ids in tokenizer(texts)["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
    whole = [joined[i : i + LENGTH] for i in range(0, len(joined) - LENGTH, LENGTH)]
    return [{"input_ids": row, "labels": row} for row in whole]


def examples(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> list[dict[str, list[int]]]:
    """Return prompt and response of each row, the loss on the response alone."""
    found = []
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    responses = tokenizer([row["response"] for row in rows])["input_ids"]
    for prompt, response in zip(prompts, responses, strict=True):
        ids, labels = prompt + response, [-100] * len(prompt) + response
        found.append({"input_ids": ids[-LENGTH:], "labels": labels[-LENGTH:]})
    return found


class Collator:
    """Pads to the longest row of a batch."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": self.pad, "labels": -100}
        made = {n: torch.tensor([r[n] + [f] * (longest - len(r[n])) for r in rows]) for n, f in fills.items()}
        return {**made, "attention_mask": (made["input_ids"] != self.pad).long()}


class Freeze(TrainerCallback):  # type: ignore[misc]  # transformers is read without types
    """Freezes the routers from a step on."""

    def __init__(self, model: OlmoeForCausalLM, step: int) -> None:
        self.model, self.step = model, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for name, parameter in self.model.named_parameters():
                if ".gate." in name:
                    parameter.requires_grad_(False)
                    parameter.grad = None


def train(model: OlmoeForCausalLM, rows: list[Any], collator: Collator, frozen_from: int, **asked: Any) -> None:
    """Train with the Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            warmup_steps=0.03,  # a share of all
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            log_level="error",
            **asked,
        )
        freeze = Freeze(model, frozen_from)
        Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[freeze]).train()


def base(tokenizer: PreTrainedTokenizerFast, rows: list[Any], collator: Collator) -> OlmoeForCausalLM:
    """Return the pretrained model of `quickstart`."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=512,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.set_experts_implementation("grouped_mm")
    train(model, rows, collator, -1, max_steps=200, learning_rate=4e-3, lr_scheduler_type="cosine", weight_decay=0.01)
    return model


@torch.no_grad()
def held_out_loss(model: OlmoeForCausalLM, rows: list[dict[str, list[int]]]) -> float:
    """Return the mean loss of a token."""
    model.eval()
    losses = []
    for i in range(0, len(rows), 8):
        ids = torch.tensor([row["input_ids"] for row in rows[i : i + 8]])
        losses.append(float(model(input_ids=ids, labels=ids, output_router_logits=False).loss))
    return sum(losses) / len(losses)


def stock_tasks(folder: Path) -> list[Any]:
    """Return lm-eval's own tasks over items on disk, as a machine without a hub has them."""
    from jobs.evaluate.harness import LocalTask, load_config

    tasks = []
    for name, shots in SHOTS.items():
        lines = {file.stem: file.read_text().splitlines() for file in (folder / name).glob("*.jsonl")}
        config = {**load_config(name), "num_fewshot": shots}
        for split in ("training_split", "validation_split", "fewshot_split", "test_split"):
            if config.get(split) not in lines:
                config[split] = None
        tasks.append(LocalTask(config, {split: [json.loads(line) for line in found] for split, found in lines.items()}))
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", default="16", help="of lm-eval's model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in ("transformers", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    texts = pq.read_table(options.data / "text.parquet")["text"].to_pylist()
    held_out = pq.read_table(options.data / "held_out.parquet")["text"].to_pylist()
    tokenizer = make_tokenizer(texts)
    collator = Collator(tokenizer.pad_token_id)
    rows = blocks(tokenizer, texts)
    instructions = examples(tokenizer, pq.read_table(options.data / "instructions.parquet").to_pylist())
    measured = blocks(tokenizer, held_out)[: HELD_OUT_TOKENS // LENGTH]
    tasks = stock_tasks(options.data / "items")
    shared = None if options.from_scratch else base(tokenizer, rows, collator)
    table = {}
    for freeze in FREEZE:
        model = copy.deepcopy(shared) if shared is not None else base(tokenizer, rows, collator)
        torch.manual_seed(0)
        frozen_from = {"none": -1, "router": 0, "none->router": 25}[freeze]
        train(
            model,
            instructions,
            collator,
            frozen_from,
            max_steps=50,
            learning_rate=5e-4,
            lr_scheduler_type="linear",
            gradient_accumulation_steps=2,
            adam_beta2=0.999,
        )
        model.config.update({"output_router_logits": False})
        model.eval()
        model.save_pretrained(options.out / freeze.replace("->", "-"))
        scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch)
        found = simple_evaluate(scorer, tasks=tasks, limit=ITEMS, bootstrap_iters=0, log_samples=False)
        assert found is not None
        scores = {name: found["results"][name]["acc,none"] for name in SHOTS}
        table[freeze] = {"val_loss": held_out_loss(model, measured), **scores}
        assert math.isfinite(table[freeze]["val_loss"])
    (options.out / "table.json").write_text(json.dumps(table))


if __name__ == "__main__":
    main()
