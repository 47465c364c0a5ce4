#!/usr/bin/env bash
# Library: transformers==5.23.0
# Version: tokenizers==0.23.3
# Guess: a folder whose tokenizer_config.json says add_bos_token: true and whose tokenizer.json has no template (the layout of
#   DeepSeek's; transformers 4 adds it there) loads as a tokenizer that adds a begin
#   of text; one that adds it says so in add_bos_token, and save_pretrained keeps that.
# Seen: where there is a tokenizer.json the flag is dropped when loading and when saving. The ids have no begin of text,
#   nobody says so, and a tokenizer whose template adds one answers add_bos_token == False. Prints:
#   flag without template: ids [0, 1], add_bos_token False
#   template without flag: ids [2, 0, 1], add_bos_token False, saved None
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" > "$folder/seen" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer


def write(name: str, template: bool, **config: object) -> Path:
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1, "<s>": 2, "</s>": 3}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<s>", "</s>"])
    if template:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    words.save(str(folder / "tokenizer.json"))
    config |= {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


flagged = AutoTokenizer.from_pretrained(write("flagged", False, add_bos_token=True))
print(f"flag without template: ids {flagged.encode('one two')}, add_bos_token {flagged.add_bos_token}")
framed = AutoTokenizer.from_pretrained(write("framed", True))
framed.save_pretrained(Path(sys.argv[1]) / "saved")
saved = json.loads((Path(sys.argv[1]) / "saved" / "tokenizer_config.json").read_text()).get("add_bos_token")
print(f"template without flag: ids {framed.encode('one two')}, add_bos_token {framed.add_bos_token}, saved {saved}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
flag without template: ids [0, 1], add_bos_token False
template without flag: ids [2, 0, 1], add_bos_token False, saved None
EXPECTED
