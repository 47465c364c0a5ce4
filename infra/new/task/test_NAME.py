"""The task NAME: `python -m pytest test_NAME.py`."""

import json
from pathlib import Path

import pytest
from moegrid.extend import code_of, load_plugin, prompts_of

FOLDER = Path(__file__).with_name("NAME")
KIND = load_plugin(FOLDER)["task NAME"]
ITEMS = FOLDER / "items"


def test_every_item_has_a_right_answer() -> None:
    check = code_of(KIND, "check")
    for path in (ITEMS / KIND.name).glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert set(KIND.columns) <= set(row)
            check(row)
    with pytest.raises(ValueError, match="as the right one"):
        check({"options": ["a"], "right": 3})


def test_a_model_is_asked_as_it_should_be() -> None:
    first = prompts_of(KIND, ITEMS)[0]
    assert first[0] == ("Question: Which of these is a number?\nAnswer:", " seven")
    assert prompts_of(KIND, ITEMS, shots=1)[0][0][0].count("Question:") == 2
