"""Sizes that are planned for each format, against what its writer writes."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from gguf_models import byte_level_tokenizer
from trimtab.formats.export import write
from trimtab.formats.export_size import export_sizes
from trimtab.formats.file_size import file_size
from trimtab.methods import make
from trimtab.models.load import load
from trimtab.models.prepare import fold
from trimtab.models.simulate import simulate
from trimtab.models.sources import open_source
from trimtab.models.targets import targets
from trimtab.quant.activations import Activations
from trimtab.recipe.rules import parse_rules


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("given") / "model", tied=False)


def tensor_bytes(folder: Path) -> int:
    """Of all safetensors below a folder: the files less their headers."""
    total = 0
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as opened:
            total += file.stat().st_size - 8 - struct.unpack("<Q", opened.read(8))[0]
    return total


def gguf_bytes(file: Path) -> int:
    """Of a GGUF file's tensors, norms in float32 and all."""
    gguf = pytest.importorskip("gguf")
    return sum(int(t.n_bytes) for t in gguf.GGUFReader(file).tensors)


INTEGER, SYMMETRIC, REAL = (
    [{"match": "*", "grid": {"bits": bits, "group": group, "zero": zero}}]
    for bits, group, zero in ((4, 32, "integer"), (3, 64, "symmetric"), (4, 32, "real"))
)
# name -> method, rules, format, rounded inputs
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str, Activations | None]] = {
    "native": ({"name": "lr-qat", "rank": 4}, INTEGER, "native", None),
    "compressed-tensors, zeros": ({"name": "lr-qat", "rank": 4}, INTEGER, "compressed-tensors", None),
    "compressed-tensors, 3 bits": ({"name": "peqa"}, SYMMETRIC, "compressed-tensors", None),
    "compressed-tensors, W4A8": (
        {"name": "rtn"},
        [{"match": "*", "grid": {"bits": 4, "group": 32}}],
        "compressed-tensors",
        Activations(8, symmetric=False),
    ),
    "gptq": ({"name": "peqa"}, INTEGER, "gptq", None),
    "awq": ({"name": "peqa"}, INTEGER, "awq", None),
    "gguf, Q4_0": ({"name": "peqa"}, SYMMETRIC, "gguf", None),
    "gguf, Q4_1": ({"name": "qa-hira"}, REAL, "gguf", None),
    "gguf, embeddings": (
        {"name": "rtn"},
        [{"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}, *SYMMETRIC],
        "gguf",
        None,
    ),
    "mlx, zeros": ({"name": "peqa"}, INTEGER, "mlx", None),
    "mlx, offsets": ({"name": "qa-hira"}, REAL, "mlx", None),
    "dense": ({"name": "lr-qat", "rank": 4}, SYMMETRIC, "dense", None),
    "peft": ({"name": "qlora", "rank": 4}, [{"match": "*", "grid": {"codebook": "nf4", "group": 32}}], "peft", None),
    "peft, q-bara": (
        {"name": "q-bara", "rank": 4},
        [{"match": "*", "grid": {"codebook": "nf4", "group": 32}}],
        "peft",
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_planned_is_written(model_folder: Path, tmp_path: Path, name: str) -> None:
    options, given, format_, activations = CASES[name]
    options = dict(options)
    method, rules = make(options.pop("name"), **options), parse_rules(given)
    layout = open_source(str(model_folder)).layout()
    about: dict[str, Any] = {"dtype": torch.bfloat16, "activations": activations}
    planned = export_sizes(layout, targets(layout, method, rules), method, **about)[format_]
    model, tokenizer = load(str(model_folder), method, rules, dtype=torch.bfloat16)
    if activations is not None:
        simulate(model, activations=activations)
    if format_ != "peft":
        fold(model)
    if format_ == "gguf":  # llama.cpp loads no tokenizer of single characters
        tokenizer = byte_level_tokenizer()
    out = tmp_path / "out"
    write(model, tokenizer, format_, out, source=model_folder)
    if format_ == "gguf":
        norms = sum(t.numel() for n, t in layout.state_dict().items() if "norm" in n)
        assert gguf_bytes(out / "model.gguf") == planned + 2 * norms  # type: ignore[operator]
    elif format_ == "native":
        assert isinstance(planned, int)
        size = file_size(open_source(str(model_folder)).layout(), method, rules, **about)
        assert tensor_bytes(out) == size.tensor_bytes <= planned <= size.bound
    else:
        assert tensor_bytes(out) == planned


def test_what_a_format_does_not_hold_has_a_reason(model_folder: Path) -> None:
    method, rules = make("peqa"), parse_rules(REAL)
    layout = open_source(str(model_folder)).layout()
    found = export_sizes(layout, targets(layout, method, rules), method, dtype=torch.bfloat16)
    assert "has 4-bit codes with a zero that is real, which compressed-tensors" in str(found["compressed-tensors"])
    assert str(found["peft"]).startswith("the model: keeps no adapter")
    assert isinstance(found["gguf"], int)


def test_a_config_that_an_engine_computes_otherwise(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["attention_bias"], config["mlp_bias"] = False, False
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    method = make("rtn")
    layout = open_source(str(folder)).layout()
    found = export_sizes(layout, targets(layout, method, None), method, dtype=torch.bfloat16, only=("mlx", "dense"))
    assert "rope_type dynamic" in str(found["mlx"])
    assert set(found) == {"mlx", "dense"}
