"""hub:// against a server that speaks the hub's HTTP API: sets, tokenizers and checkpoints, and all that goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save
from tokenizers import Tokenizer, models

from orchestrator.catalog.benchmarks import BENCHMARKS
from orchestrator.data.hub_sets import HUB_SETS
from tests.hub_fixtures import CONVERSATIONS, FILES, card, declared, lines
from tests.hub_server import TOKEN, Fault, Hub, serving
from tests.picture_samples import picture


class Client:
    """A process that reads from the hub."""

    def __init__(self, hub: Hub, home: Path, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_client"],
            cwd=Path(__file__).parents[2],
            env=kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(home / "log").open("a"),
            text=True,
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert "crash" not in answer, answer
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as hub:
        for name, files in FILES.items():
            hub.repository(name).push(files)
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def client(hub: Hub, home: Path) -> Iterator[Client]:
    client = Client(hub, home)
    yield client
    client.close()


def instructions(client: Client, source: str, **fields: str) -> dict[str, Any]:
    return client.ask("rows", source=source, format="instruction", **fields)


def test_every_known_set_has_a_fixture() -> None:
    assert set(FILES) == set(HUB_SETS)


def test_lima_is_read_as_it_lies_there(hub: Hub, client: Client) -> None:
    """A script that is not run, and rows with a list of texts, under the fields of the recipes."""
    *rows, read = instructions(client, "hub://GAIR/lima@main")["answer"]
    assert [(row["prompt"], row["response"]) for row in rows] == [(turns[0], f" {turns[1]}") for turns in CONVERSATIONS]
    assert read == {"commits": {"hub://GAIR/lima@main": hub.repository("GAIR/lima").refs["main"]}}
    assert not any("lima.py" in path for _, path, _, _ in hub.requests)


def test_minipile_is_read_by_the_names_of_its_files(client: Client) -> None:
    for split in ("train", "validation", "test"):
        row, _ = client.ask("rows", source="hub://JeanKaddour/minipile@main", format="text", split=split)["answer"]
        assert row["text"] == f"a {split} text"


@pytest.mark.parametrize("name", [name for name, benchmark in BENCHMARKS.items() if benchmark.hub])
def test_a_benchmark_is_read_from_its_set(client: Client, name: str) -> None:
    benchmark = BENCHMARKS[name]
    found = client.ask("items", tasks=list(benchmark.tasks), source=f"hub://{benchmark.hub}@main", format="benchmark")
    assert {path.split("/")[0] for path in found["answer"]} == set(benchmark.tasks)
    assert all(len(rows) == 1 for rows in found["answer"].values()), "unlabelled pairs are dropped"


@pytest.mark.parametrize("task, source", [("race", "EleutherAI/race:high"), ("cbt", "cam-cst/cbt:CN")])
def test_a_task_is_read_from_its_set(client: Client, task: str, source: str) -> None:
    found = client.ask("items", tasks=[task], source=f"hub://{source}@main", format="items")
    assert list(found.get("answer", found)) == [f"{task}/test.jsonl"]


@pytest.mark.parametrize(
    "config, said", [("adjunct_island+wh_island", ["adjunct_island", "wh_island"]), ("wh_island", ["wh_island"])]
)
@pytest.mark.parametrize("every", [False, True])
def test_several_configurations_are_read_as_one(client: Client, config: str, said: list[str], every: bool) -> None:
    """BLiMP has one for each of its 67 phenomena."""
    named = "*" if every else config
    found = client.ask("items", tasks=["blimp"], source=f"hub://nyu-mll/blimp:{named}@main", format="items")["answer"]
    rows = [row["UID"] for row in found["blimp/train.jsonl"]]
    assert rows == (["adjunct_island", "wh_island"] if every else said)


def test_a_classification_is_training_data_as_it_lies_there(client: Client) -> None:
    """Pairs without a gold label (-1) are left out."""
    data = {"task": "nli", "split": "train", "format": "instruction"}
    (row, _) = client.ask("rows", source="hub://stanfordnlp/snli@main", **data)["answer"]
    assert row["prompt"].endswith("True, False, or Neither?\nAnswer:")
    assert row["response"] in (" True", " Neither", " False")
    *rows, _ = client.ask("rows", source="hub://facebook/anli@main", **{**data, "split": "train_r2"})["answer"]
    assert [row["response"] for row in rows] == [" True"] or len(rows) == 1


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_of_a_repository_is_read_alone(client: Client, number: int) -> None:
    source = f"hub://cerebras/SlimPajama-627B:train/chunk{number}@main"
    row, _ = client.ask("rows", source=source, format="text")["answer"]
    assert row["text"] == f"Part {number}."


def test_a_commit_stays_what_it_was_and_a_branch_moves(hub: Hub, client: Client) -> None:
    repository = hub.repository("made/up")
    first = repository.push(declared({"default": {"train": [{"prompt": "P", "response": "first"}]}}))
    second = repository.push(declared({"default": {"train": [{"prompt": "P", "response": "second"}]}}))
    for revision, commit, said in ((first, first, " first"), ("main", second, " second"), (second, second, " second")):
        row, read = instructions(client, f"hub://made/up@{revision}")["answer"]
        assert row["response"] == said
        assert read["commits"] == {f"hub://made/up@{revision}": commit}


def test_the_hubs_own_parquet_copy_is_a_revision(hub: Hub, client: Client) -> None:
    copy = {"high/train/0000.parquet": declared({"high": {"train": [{"prompt": "P", "response": "R"}]}})}
    files = {path: next(data for name, data in made.items() if name.endswith("parquet")) for path, made in copy.items()}
    hub.repository("made/converted").push({"converted.py": b"raise SystemExit"})
    hub.repository("made/converted").push(files, "refs/convert/parquet")
    refused = instructions(client, "hub://made/converted@main")
    assert "no data files that can be read" in refused["error"]
    row, _ = instructions(client, "hub://made/converted:high@refs/convert/parquet")["answer"]
    assert row["response"] == " R"


@pytest.mark.parametrize(
    "source, fields, message, hint",
    [
        ("hub://GAIR/nothing@main", {}, "the hub has no hub://GAIR/nothing@main, or keeps it private", "HF_TOKEN"),
        ("hub://GAIR/lima@v9", {}, "GAIR/lima has no revision 'v9'", "a commit, a branch or a tag"),
        ("hub://GAIR/lima@main", {"split": "dev"}, "has no split 'dev'", ""),
        ("hub://GAIR/lima@main", {"split": "test"}, "row 1: its conversation has 1 turn", "another split"),
        ("hub://nyu-mll/glue:stt2@main", {}, "nyu-mll/glue has no configuration 'stt2'", "hub://nyu-mll/glue:CONFIG"),
        ("hub://cam-cst/cbt:CN@main", {"split": "test"}, "row 1 has no column 'prompt'", "prompt_field"),
    ],
)
def test_what_is_not_there_is_said(
    client: Client, source: str, fields: dict[str, str], message: str, hint: str
) -> None:
    said = instructions(client, source, **fields)
    assert message in said["error"]
    assert hint in said["hint"]
    assert said["kind"] == ("source_away" if "private" in message else "source")


def test_a_picture_is_read_as_it_is_stored_and_decoded_within_our_bounds(hub: Hub, client: Client) -> None:
    """Not by the reader of the rows, which would decode whatever it meets."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    text = {"dtype": "string", "_type": "Value"}
    features = {"image": {"_type": "Image"}, "prompt": text, "response": text}

    def push(*images: bytes) -> None:
        columns = {
            "image": pa.array([{"bytes": image, "path": None} for image in images], kind),
            "prompt": pa.array([f"{n}?" for n in range(len(images))]),
            "response": pa.array(["red"] * len(images)),
        }
        declared = {"huggingface": json.dumps({"info": {"features": features}})}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns).replace_schema_metadata(declared), sink)
        pictures = {"README.md": card({"default": {"train": "train.parquet"}})}
        hub.repository("made/pictures").push(
            {**pictures, "train.parquet": sink.getvalue().to_pybytes()}, f"v{len(images)}"
        )

    red = picture((255, 0, 0))
    push(red)
    row, read = client.ask("rows", source="hub://made/pictures@v1", format="vision")["answer"]
    assert row["images"] == [hashlib.sha256(red).hexdigest()]
    assert read["commits"]
    push(red, b"broken")
    said = client.ask("rows", source="hub://made/pictures@v2", format="vision")
    assert "row 2: its picture is no PNG or JPEG" in said["error"]


def test_a_damaged_file_is_a_source_error(hub: Hub, client: Client) -> None:
    hub.repository("made/damaged").push({"train.jsonl": b'{"prompt": "P", "response": "R"}\n{"prompt": \n'})
    said = instructions(client, "hub://made/damaged@main")
    assert said["kind"] == "source"
    assert "hub://made/damaged@main could not be read" in said["error"]


def test_texts_that_a_reader_took_for_dates_are_refused_with_a_way_out(hub: Hub, client: Client) -> None:
    hub.repository("made/dates").push({"train.jsonl": lines({"prompt": "When?", "response": "2020-01-01"})})
    said = instructions(client, "hub://made/dates@main")
    assert "row 1 is datetime, not text" in said["error"]
    assert "file://" in said["hint"]


def test_a_gated_set_needs_a_token_of_an_account_that_may_read_it(hub: Hub, client: Client) -> None:
    hub.repository("made/gated").gated = True
    hub.repository("made/gated").push({"train.jsonl": lines({"prompt": "P", "response": "R"})})
    said = instructions(client, "hub://made/gated@main")
    assert said["error"] == "hub://made/gated@main is gated: nobody without a token may read it"
    assert "HF_TOKEN" in said["hint"]
    assert said["kind"] == "source_away", "with a token, resume tries it again"
    client.ask("token", value="hf_of_a_stranger")
    assert "this account may not read it" in instructions(client, "hub://made/gated@main")["error"]
    client.ask("token", value=TOKEN)
    assert "answer" in instructions(client, "hub://made/gated@main")
    client.ask("token", value="")


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, client: Client) -> None:
    texts = ["".join(f"{number:07d}" for number in range(start, start + 90_000)) for start in range(20)]
    hub.repository("made/large").push({"train.jsonl": lines(*({"prompt": "P", "response": text} for text in texts))})
    cut = 11 * 2**20  # the client writes down every 10 MiB
    hub.faults.append(Fault("GET .*made/large/.*train.jsonl", cut=cut))
    before = len(hub.requests)
    *rows, _ = instructions(client, "hub://made/large@main")["answer"]
    assert [row["response"] for row in rows] == [f" {text}" for text in texts]
    asked = [found for method, path, found, _ in hub.requests[before:] if method == "GET" and "train.jsonl" in path]
    assert len(asked) == 2
    assert asked[0] == ""
    assert 0 < int(asked[1].removeprefix("bytes=").rstrip("-")) <= cut


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again_and_given_up_for_now(hub: Hub, client: Client, status: int) -> None:
    hub.repository(f"made/busy{status}").push({"train.jsonl": lines({"prompt": "P", "response": "R"})})
    hub.faults.append(Fault(f"GET /api/datasets/made/busy{status}", status, times=2))
    assert "answer" in instructions(client, f"hub://made/busy{status}@main")
    hub.faults.append(Fault(f"GET /api/datasets/made/busy{status}", status, times=1000))
    hub.repository(f"made/busy{status}").push({}, "other")
    said = instructions(client, f"hub://made/busy{status}@other")
    hub.faults.clear()
    assert said["error"] == f"the hub is busy: hub://made/busy{status}@other could not be read"
    assert said["cause"].startswith(f"it answered {status}")
    assert said["kind"] == "unreachable", "the engine tries it again"


def test_a_tokenizer_and_a_checkpoint_have_a_revision(hub: Hub, client: Client) -> None:
    def files(size: int) -> dict[str, bytes]:
        vocabulary = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, size)}}
        return {
            "config.json": json.dumps({"model_type": "llama", "vocab_size": size}).encode(),
            "tokenizer.json": Tokenizer(models.WordLevel(vocabulary, unk_token="w1")).to_str().encode(),
            "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
            "model.safetensors": save({"model.norm.weight": np.full(2, float(size), np.float32)}),
            "pytorch_model.bin": b"a pickle that is never fetched",
        }

    repository = hub.repository("made/model", "model")
    old = repository.push(files(5))
    new = repository.push(files(7))
    for suffix, commit, size in (("", new, 7), ("@main", new, 7), (f"@{old}", old, 5)):
        source = f"hub://made/model{suffix}"
        answer = client.ask("tokenizer", source=source)["answer"]
        assert (answer["vocabulary"], answer["commits"]) == (size, {source: commit})
        answer = client.ask("checkpoint", source=source)["answer"]
        assert answer["tensors"] == {"model.norm.weight": [size, size]}
    assert "model.safetensors" in client.ask("judge", source="hub://made/model", revision=old)["answer"]
    for do in ("tokenizer", "checkpoint"):
        assert "made/model has no revision 'v9'" in client.ask(do, source="hub://made/model@v9")["error"]
    assert not any(path.endswith(".bin") for _, path, _, _ in hub.requests)


def test_a_gated_checkpoint_says_so(hub: Hub, client: Client) -> None:
    hub.repository("made/judge", "model").gated = True
    hub.repository("made/judge", "model").push({"config.json": b"{}"})
    for do, arguments in (("checkpoint", {}), ("tokenizer", {}), ("judge", {"revision": "main"})):
        said = client.ask(do, source="hub://made/judge", **arguments)
        assert "hub://made/judge is gated" in said["error"]
        assert "HF_TOKEN" in said["hint"]


def test_without_a_network_the_cached_revision_is_read_and_no_other(tmp_path: Path) -> None:
    """Also with the hub switched off; another revision than the one asked for is never given out."""
    with serving() as away:
        repository = away.repository("made/cached")
        old, new = (repository.push({"train.jsonl": lines({"prompt": "P", "response": r})}) for r in ("old", "new"))
        first = Client(away, tmp_path)
        assert instructions(first, f"hub://made/cached@{old}")["answer"][0]["response"] == " old"
    switched_off = Client(away, tmp_path, HF_HUB_OFFLINE="1")
    for alone, kind, message in (
        (first, "unreachable", "the hub cannot be reached from this machine"),
        (switched_off, "source_away", "the hub is switched off"),
    ):
        assert instructions(alone, f"hub://made/cached@{old}")["answer"][0]["response"] == " old"
        for revision in (new, "main"):
            said = instructions(alone, f"hub://made/cached@{revision}")
            assert message in said["error"]
            assert said["kind"] == kind
            assert said["hint"]
        alone.close()
