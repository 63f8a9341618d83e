"""What writers take for granted of transformers and gguf (see docs/upgrades.md)."""

import json
from pathlib import Path

import gguf

import trimtab as tt
from exported import everywhere, llama
from trimtab.formats.directory import write_surroundings
from trimtab.formats.gguf import vocabulary
from trimtab.methods import Rtn
from trimtab.models.load import load
from trimtab.models.transformers_bridge import compute_dtype


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    tt.save(tt.prepare(llama(), Rtn(), [everywhere(bits=4, group=32)]), tmp_path / "saved")
    (tmp_path / "out").mkdir()
    model, _ = load(str(tmp_path / "saved"))
    assert model.config._name_or_path == str(tmp_path / "saved"), "transformers keeps the path of a model elsewhere now"
    write_surroundings(tmp_path / "out", model, None, compute_dtype(model), None)
    text = (tmp_path / "out" / "config.json").read_text()
    assert str(tmp_path) not in text, "transformers writes the path of a model under another key than _name_or_path"
    assert "_name_or_path" not in json.loads(text)


def test_types_of_tokens_have_the_numbers_of_gguf() -> None:
    for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE"):
        theirs = int(gguf.TokenType[name])
        assert getattr(vocabulary, name) == theirs, f"gguf's TokenType.{name} is {theirs} now"
