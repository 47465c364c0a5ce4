"""A store that looks as a finished (or half-finished) grid leaves it, without training anything."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

from orchestrator.store import Blob, Manifest, Store

SETTINGS = ("none", "router", "expert", "none->router")
PRETRAIN_STEPS, FINETUNE_STEPS, LOG_EVERY = 40, 20, 5
BEGAN = 1_700_000_000.0


def key(*parts: object) -> str:
    """Return a key that looks like an artifact's."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


class GridStore:
    """Writes the root document, and commits stages one by one as attempts would.

    `effect` is added to a setting's answer_bpb, so that a test knows which differences are real.
    """

    def __init__(
        self,
        store: Store,
        name: str = "demo",
        settings: Sequence[str] = SETTINGS,
        seeds: Sequence[int] = (0, 1, 2),
        effects: dict[str, float] | None = None,
        tasks: Sequence[str] = ("arc_easy", "piqa"),
        items: int = 40,
        probes: bool = False,
        sees: bool = False,
    ) -> None:
        self.store, self.name, self.tasks, self.items = store, name, tuple(tasks), items
        self.effects = effects or {}
        self.suites = ("lm", "reasoning", *(("probe",) if probes else ()), *(("seeing_probe",) if sees else ()))
        self.stages: dict[str, dict[str, Any]] = {}
        self.cells: list[dict[str, Any]] = []
        self.base = self._stage("train", "pretrain", "pretrain", start=0, stop=PRETRAIN_STEPS, frozen="")
        for setting in settings:
            for seed in seeds:
                self._cell(setting, seed)
        document = {
            "format": 1,
            "name": name,
            "description": "Freeze schedules <b>& more</b>",
            "scale": "tiny",
            "recipe": "finetune",
            "shared": True,
            "seed": "finetune",
            "factors": ["freeze", "seed"],
            "baseline": {"freeze": "none"},
            "primary": ["answer_bpb", "bits_per_byte"],
            "cells": self.cells,
            "sections": {
                "m": {"hidden_size": 64, "num_layers": 2, "moe": {"num_experts": 8, "top_k": 2}},
                "f": {"lr": 2e-5, "data": {"source": "file://demo.jsonl", "digest": "ab" * 32}},
                "e": {"tasks": [{"name": task, "metric": "acc"} for task in self.tasks], "source": "file://items"},
                **{f"s{seed}": {"finetune": seed} for seed in seeds},
            },
            "stages": self.stages,
            "keys": sorted(self.stages),
        }
        self.document = {**document, "digest": key(json.dumps(document, sort_keys=True))}
        store.write_root(name, str(self.document["digest"]), self.document)

    def _stage(self, kind: str, phase: str, label: str, *parts: object, **facts: Any) -> str:
        name = key(kind, phase, label, *parts)
        steps = facts.get("stop", 0) - facts.get("start", 0)
        self.stages[name] = {
            "kind": kind,
            "phase": phase,
            "label": label,
            "steps": steps,
            "parents": [],
            "cells": 0,
            **facts,
        }
        return name

    def _cell(self, setting: str, seed: int) -> None:
        first, _, second = setting.partition("->")
        half = FINETUNE_STEPS // 2
        one = self._stage("train", "finetune", f"{first} 0-{half}", first, seed, start=0, stop=half, frozen=first)
        last = second or first
        two = self._stage(
            "train",
            "finetune",
            f"{last} {half}-{FINETUNE_STEPS}",
            first,
            last,
            seed,
            start=half,
            stop=FINETUNE_STEPS,
            frozen=last,
        )
        results = []
        for at, state, step in ((0.5, one, half), (1.0, two, FINETUNE_STEPS)):
            for suite in (*self.suites, *(() if at < 1 else ("efficiency",))):
                result = self._stage("evaluate", "evaluate", f"{suite} at {at}", state, suite=suite, state=state)
                results.append({"key": result, "suite": suite, "at": at, "step": step})
        cell = key("cell", setting, seed)[:12]
        stages = [self.base, one, two, *(r["key"] for r in results)]
        for stage in stages:
            self.stages[stage]["cells"] += 1
        self.cells.append(
            {
                "id": cell,
                "name": f"freeze={setting} seed={seed}",
                "setting": f"freeze={setting}",
                "factors": {"freeze": setting, "seed": seed},
                "stages": stages,
                "final": two,
                "results": results,
                "parameters": {"total": 3_900_000, "active": 1_200_000},
                "flops_per_token": 7_200_000,
                "resolved": {"model": "m", "finetune": "f", "evaluate": "e", "seed": f"s{seed}"},
            }
        )

    def cell(self, setting: str, seed: int) -> dict[str, Any]:
        """Return the root document's entry of one cell."""
        return next(c for c in self.cells if c["factors"] == {"freeze": setting, "seed": seed})

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """Return the series of a training stage, one row every `LOG_EVERY` steps."""
        facts = self.stages[stage]
        chance = random.Random(stage)
        return [
            {
                "step": step,
                "time": BEGAN + step,
                "train/loss": 3.0 - 0.01 * step + 0.01 * chance.random(),
                "routing/load_balance": 2.9,
            }
            for step in range(facts["start"] + LOG_EVERY, facts["stop"] + 1, LOG_EVERY)
        ]

    def submit(self, batch: str, stages: Sequence[str]) -> str:
        """Record that one job was asked to run `stages`; return its attempt."""
        attempt = f"{batch}-0"
        job = {"attempt": attempt, "label": batch, "stages": [{"key": stage} for stage in stages]}
        body = {"format": 1, "batch": batch, "grid": self.name, "site": "local", "jobs": [job]}
        self.store.create_json(f"submissions/{batch}.json", body)
        return attempt

    def tell(self, attempt: str, sequence: int, stage: str, rows: Iterable[dict[str, Any]]) -> None:
        """Append a chunk to the live series of an attempt."""
        self.store.create_json(f"attempts/{attempt}/series/{sequence:06d}.json", {"stage": stage, "rows": list(rows)})

    def fail(self, attempt: str, stage: str, kind: str = "nan", message: str = "the loss is not finite") -> None:
        """Leave the failure record of an attempt at a stage."""
        body = {"stage": stage, "kind": kind, "message": message, "hint": "lower the learning rate", "exit_code": 1}
        self.store.create_json(f"failures/{stage}/{attempt}.json", {**body, "tail": "the last line of the log"})

    def commit(self, stage: str, attempt: str = "batch-0", plugins: Sequence[dict[str, Any]] = ()) -> Manifest:
        """Commit a stage with the metrics, series and items that its kind leaves, made with `plugins`."""
        facts = self.stages[stage]
        blobs: list[Blob] = []
        metrics: dict[str, float] = {}
        info: dict[str, Any] = {}
        if facts["kind"] == "train":
            rows = json.dumps(self.rows(stage)).encode()
            blobs.append(self.store.artifacts.write_blob(attempt, "series.json", rows))
            info = {"weights_sha256": key("weights", stage), "train_seconds": 60.0, "tokens": 5120 * facts["stop"]}
        else:
            metrics, info = self._measured(stage, facts)
        if facts.get("suite") == "reasoning":
            blobs.append(self.store.artifacts.write_blob(attempt, "items.parquet", self._items(stage, metrics)))
        if facts.get("suite") == "probe":
            blobs.append(self.store.artifacts.write_blob(attempt, "probe.npz", _npz(self._arrays(stage))))
        if facts.get("suite") == "seeing_probe":
            parts = {part: self._arrays(key(stage, part)) for part in ("encoder", "connector")}
            arrays = {f"{part}.{name}": array for part, found in parts.items() for name, array in found.items()}
            blobs.append(self.store.artifacts.write_blob(attempt, "sight.npz", _npz(arrays)))
        return self.store.artifacts.commit(
            Manifest(
                key=stage,
                kind=facts["kind"],
                spec={"kind": facts["kind"], "state": facts.get("state", "")},
                numerics={"device": "cpu", "torch": "2.13.0", "threads": 1, "world_size": 1},
                provenance={
                    "git": "c0ffee" * 6,
                    "dirty": "",
                    "host": "here",
                    "seconds": 60.0,
                    **({"plugins": list(plugins)} if plugins else {}),
                },
                attempt=attempt,
                blobs=tuple(blobs),
                metrics=metrics,
                info=info,
                created=BEGAN + 1000 + facts["steps"],
            )
        )

    def commit_all(self, stages: Iterable[str] | None = None) -> None:
        """Commit every stage, or those given."""
        for stage in self.stages if stages is None else stages:
            self.commit(stage)

    def _measured(self, stage: str, facts: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
        chance = random.Random(stage)
        users = [c for c in self.cells if stage in c["stages"]]
        effect = self.effects.get(users[0]["factors"]["freeze"], 0.0)
        noise = random.Random(users[0]["factors"]["seed"]).gauss(0, 0.02) + chance.gauss(0, 0.002)
        if facts["suite"] == "lm":
            return {"val_loss": 2.8 + noise + effect, "bits_per_byte": 1.95 + noise + effect}, {}
        if facts["suite"] == "probe":
            return {"router_margin": 0.3 + noise}, {}
        if facts["suite"] == "seeing_probe":
            return {"encoder/drop_top1": -0.1 + noise, "connector/drop_top1": noise}, {}
        if facts["suite"] == "efficiency":
            measured = {"load_balance": 2.8 + noise, "collaboration": 2.1 + noise, "capacity": 0.01 + noise}
            counts = [[chance.randrange(20, 200) for _ in range(8)] for _ in range(4)]
            return {**measured, "specialization": 0.02 + noise}, {"expert_counts": counts}
        metrics = {"answer_bpb": 1.2 + noise + effect, "reasoning_avg": 0.25}
        for task in self.tasks:
            metrics[f"{task}/acc"] = 0.25 + noise
            metrics[f"{task}/answer_bpb"] = 1.2 + noise + effect
        names = [f"{task}/acc" for task in self.tasks]
        info = {
            "stderr": dict.fromkeys(names, 0.06),
            "n": dict.fromkeys(names, self.items),
            "chance": dict.fromkeys(names, 0.25),
        }
        return metrics, info

    def _items(self, stage: str, metrics: dict[str, float]) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, list[Any]] = {"task": [], "item": [], "acc": [], "answer_bpb": [], "intervention": []}
        for task in self.tasks:
            for item in range(self.items):
                shared = random.Random(f"{task}{item}").gauss(0, 0.3)
                columns["task"].append(task)
                columns["item"].append(str(item))
                columns["acc"].append(float(item % 4 == 0))
                columns["answer_bpb"].append(metrics[f"{task}/answer_bpb"] + shared)
                columns["intervention"].append("base")
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        return bytes(sink.getvalue().to_pybytes())

    def _arrays(self, stage: str) -> dict[str, Any]:
        import numpy as np

        rng = np.random.default_rng(int(stage[:8], 16))
        return {
            "heldout.counts": rng.integers(1, 50, (2, 8)),
            "heldout.router_margin": rng.random(2),
            "heldout.expert_allocation_entropy": rng.random(2),
            "heldout.pairs": rng.integers(1, 50, (2, 8, 8)),
            "sample": np.argsort(rng.random((2, 30, 8)), axis=-1)[..., :2].astype(np.int16),
            "weight_similarity": rng.random((2, 8, 8)),
            "output_similarity": rng.random((2, 8, 8)),
        }


def _npz(arrays: dict[str, Any]) -> bytes:
    import numpy as np

    sink = io.BytesIO()
    np.savez_compressed(sink, **arrays)
    return sink.getvalue()
