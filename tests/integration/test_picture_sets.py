"""The pinned emoji package itself, through the data stage: what it holds, and that what is unseen stays unseen."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.data.fetching import fetch
from jobs.data.images import digest_of, load_images, pixels
from jobs.data.pictures.drawings import drawings_of
from orchestrator.catalog.pictures import GROUPS, VISION_TASKS
from orchestrator.catalog.pins import PACKAGES
from orchestrator.errors import SourceAway
from orchestrator.spec.cell import DataSpec
from orchestrator.spec.work import DataWork
from orchestrator.store import Store
from tests.integration.stages import run_stages

GOOGLE = PACKAGES["npm", "emoji-datasource-google"]
TASKS = tuple(task for task in VISION_TASKS if task != "vision_drawer")  # it needs the other package too


@pytest.fixture(scope="module", autouse=True)
def package() -> None:
    """Fetch it once for this machine, or skip where its client or a registry is missing."""
    try:
        fetch(GOOGLE)
    except SourceAway as error:
        pytest.skip(f"{error.error}: {error.cause}")


def test_the_package_holds_what_the_documentation_says() -> None:
    drawings = drawings_of(GOOGLE)
    assert len(drawings) == 1906
    assert {drawing.group for drawing in drawings} == {*GROUPS, ""}
    assert len({drawing.kind for drawing in drawings}) == 98, "skin tones are no kind of drawing"
    assert sum(drawing.trained for drawing in drawings) == 1292
    by_identity: dict[str, set[bool]] = {}
    for drawing in drawings:
        by_identity.setdefault(drawing.identity, set()).add(drawing.trained)
    assert all(len(split) == 1 for split in by_identity.values())
    # For ever: results of another split could not be compared.
    known = {"1F600": True, "1F34E": True, "1F431": True, "1F697": False}
    assert {code: drawing.trained for drawing in drawings if (code := drawing.identity) in known} == known


def test_the_stages_of_training_data_and_items_hold_every_picture_once(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    data = DataWork(
        DataSpec(f"{GOOGLE.url}/questions", format="vision", rows=400, holdout=0.1, digest=GOOGLE.sha256), 3
    )
    items = DataWork(DataSpec(f"{GOOGLE.url}/items", format="items", digest=GOOGLE.sha256, holdout=0.0), 0, TASKS)
    folders = {}
    for manifest in run_stages(store, [data, items]):
        folder = folders[manifest.key] = tmp_path / manifest.key
        for blob in manifest.blobs:
            store.artifacts.fetch(manifest, blob.name, folder)
    trained = folders[data.key()]
    rows = {split: pq.read_table(trained / f"{split}.parquet").to_pylist() for split in ("train", "heldout")}
    shown = {thing for row in rows["train"] for thing in row["identity"].split("+")}
    assert not shown & {row["identity"].split("+")[0] for row in rows["heldout"]}
    images = load_images(trained / "images.parquet")
    assert {digest for split in rows.values() for row in split for digest in row["images"]} == set(images)
    assert all(digest_of(data) == digest for digest, data in images.items())
    assert pixels(next(iter(images.values())), 84).shape == (84, 84, 3)

    asked = folders[items.key()]
    pictures = load_images(asked / "images.parquet")
    answers: dict[str, Counter[str]] = {}
    for task in TASKS:
        for line in (asked / task / "test.jsonl").read_text("utf-8").splitlines():
            item = json.loads(line)
            assert not shown & set(item["identity"].split("+"))
            assert item["choices"][item["label"]] == item["answer"]
            assert set(item["images"]) <= set(pictures)
            answers.setdefault(task, Counter())[item["answer"]] += 1
    assert {*answers} == {*TASKS}
    assert len(answers["vision_group"]) == len(GROUPS)
    for task in ("vision_existence_random", "vision_existence_popular", "vision_existence_adversarial"):
        assert abs(answers[task]["yes"] - answers[task]["no"]) <= 1
    best = max(answers["vision_group"].values()) / answers["vision_group"].total()
    assert np.isclose(best, 0.25, atol=0.08), "no group is most of them: a constant answer is near chance"
