"""A GGUF header whose numbers are wrong is refused before gguf's reader follows them."""

import random
from pathlib import Path

import gguf
import numpy as np
import pytest

from fuzz.gguf_fields import Field, fields
from trimtab.formats.gguf import header


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a value of every type, an array of each kind, and two tensors."""
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in (
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float32",
        "float64",
        "bool",
    ):
        getattr(writer, f"add_{kind}")(f"x.{kind}", 1)
    writer.add_string("x.text", "text")
    for name, values in (("texts", ["a", "b", "c"]), ("numbers", [1, 2, 3]), ("arrays", [[1, 2], [3]])):
        writer.add_array(f"x.{name}", values)
    writer.add_tensor("a", np.ones((4, 32), np.float32))
    writer.add_tensor("b", np.ones((2, 3), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def changed(file: Path, tmp_path: Path, field: Field, value: int) -> Path:
    data = bytearray(file.read_bytes())
    data[field.at : field.at + field.size] = (value % 256**field.size).to_bytes(field.size, "little")
    new = tmp_path / "x.gguf"
    new.write_bytes(data)
    return new


def test_a_whole_file_is_let_through(file: Path) -> None:
    header.check(file)
    assert {t.name for t in gguf.GGUFReader(file).tensors} == {"a", "b"}


def test_every_length_count_and_type_stays_inside(file: Path, tmp_path: Path) -> None:
    """Of those that are far too large, none is followed."""
    words = ("length", "items of", "type", "tensors", "keys", "dimension", "place", "magic", "version")
    for field in fields(file.read_bytes()):
        if field.name.startswith(words):
            with pytest.raises(header.Damaged):
                header.check(changed(file, tmp_path, field, 2**62 + 2**30 + 77))


def test_cut_anywhere_it_is_refused(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    end = max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(file).tensors)  # behind it is padding
    for at in [*range(0, end, 7), end - 1]:
        (tmp_path / "x.gguf").write_bytes(data[:at])
        with pytest.raises(header.Damaged):
            header.check(tmp_path / "x.gguf")


def test_what_is_let_through_gguf_reads(file: Path, tmp_path: Path) -> None:
    rng, found, let = random.Random(0), fields(file.read_bytes()), 0
    for _ in range(300):
        field = rng.choice(found)
        new = changed(file, tmp_path, field, rng.choice((0, 1, 2, 3, 8, 9, 255, 2**16, rng.randrange(2**64))))
        try:
            header.check(new)
        except header.Damaged:
            continue
        let += 1
        try:
            gguf.GGUFReader(new)
        except (ValueError, KeyError):  # names that are no UTF-8, or that stand there twice
            continue
    assert 20 < let < 250


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("version", 1, "version 1"),
        ("dimensions of a", 5, "5 dimensions"),
        ("dimension 0 of a", 0, "has shape"),
        ("type of a", 99, "type 99"),
        ("type of b", 2, "which its type does not have"),
        ("place of b", 0, "where the file ends, or another tensor is"),
        ("place of b", 7, "where the file ends, or another tensor is"),
    ],
)
def test_it_is_said_what_is_wrong(file: Path, tmp_path: Path, field: str, value: int, said: str) -> None:
    (found,) = [f for f in fields(file.read_bytes()) if f.name == field]
    with pytest.raises(header.Damaged, match=said):
        header.check(changed(file, tmp_path, found, value))
