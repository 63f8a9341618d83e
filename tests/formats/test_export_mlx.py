"""MLX's affine layout, read back in float64 from its documentation: a row's words are one stream of bits, lowest first,

    W = scales * c + biases

and compared with the words that MLX itself made (`stored/mlx_words.py`). mlx-lm runs such folders in `serving/test_mlx.py`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig

import tiny
import trimtab as tt
from exported import EMBEDDING, everywhere, linears, prepared, shake, tensors, write
from gguf_models import SIZES, random_model
from trimtab.errors import UserError
from trimtab.formats.mlx.write import width
from trimtab.methods import LrQat, QaHira, Rtn
from trimtab.models.transformers_bridge import quant_layers
from trimtab.quant.int32_packing import pack_int32


def read(folder: Path, name: str) -> np.ndarray:
    """The float64 matrix of a packed layer, its width and group as config.json says."""
    about = json.loads((folder / "config.json").read_text())["quantization"][name]
    stored = {part: tensors(folder)[f"{name}.{part}"] for part in ("weight", "scales", "biases")}
    packed = stored["weight"].numpy()
    assert packed.dtype == np.uint32
    stream = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little").astype(np.float64)
    codes = stream.reshape(len(packed), -1, about["bits"]) @ 2.0 ** np.arange(about["bits"])
    scale, bias = (np.repeat(stored[p].double().numpy(), about["group_size"], 1) for p in ("scales", "biases"))
    return np.asarray(scale * codes + bias)


@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize(
    ("bits", "zero"),
    [(b, z) for z in ("symmetric", "integer", "real") for b in range(1, 9) if (b, z) != (8, "integer")],
)
def test_layout(tmp_path: Path, bits: int, zero: str, group: int | None) -> None:
    method: Any = QaHira() if zero == "real" else LrQat(rank=4)
    model = prepared(EMBEDDING, everywhere(bits=bits, zero=zero, group=group), method=method)
    shake(model)
    tt.fold(model)
    assert write(model, "mlx", tmp_path / "out").kind == "exact"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    for name, layer in {**linears(model), "model.embed_tokens": quant_layers(model)["model.embed_tokens"]}.items():
        assert np.array_equal(read(tmp_path / "out", name), layer.base.dequantize(torch.float64).numpy()), name
        assert tensors(tmp_path / "out")[f"{name}.biases"].dtype == torch.bfloat16
    assert config["quantization"]["model.layers.0.mlp.up_proj"]["bits"] == width(bits, zero)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_words_are_those_of_mlx(bits: int) -> None:
    stored = load_file(Path(__file__).parents[1] / "stored/mlx_words.safetensors")
    codes = stored[f"{bits}.codes"]
    assert len(codes.unique()) > 2
    assert torch.equal(pack_int32(codes, bits).view(torch.uint32), stored[f"{bits}.words"])


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_packed_and_what_is_not(tmp_path: Path, tied: bool) -> None:
    head = {"match": "lm_head", "grid": None if tied else {"bits": 6, "group": 32}}
    rules = [
        head,
        {"match": "*.0.mlp.down_proj", "grid": None},
        {"match": "*.0.*", "grid": {"bits": 3, "group": 64, "zero": "integer"}},
    ]
    model = prepared(EMBEDDING, *rules, everywhere(bits=4, group=32), tied=tied)
    write(model, "mlx", tmp_path / "out")
    config, stored = json.loads((tmp_path / "out/config.json").read_text()), tensors(tmp_path / "out")
    found = {n: (x["bits"], x["group_size"]) for n, x in config["quantization"].items() if isinstance(x, dict)}
    assert found["model.layers.0.self_attn.q_proj"] == (4, 64)  # an integer zero takes one more bit
    assert found["model.layers.1.self_attn.q_proj"] == (4, 32)
    assert found["model.embed_tokens"] == (8, 32)
    assert (found.get("lm_head"), "lm_head.weight" in stored) == ((None, False) if tied else ((6, 32), True))
    assert "model.layers.0.mlp.down_proj" not in found
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    for layer in range(2):
        bias = stored[f"model.layers.{layer}.self_attn.q_proj.bias"]
        assert torch.equal(bias, model.get_submodule(f"model.layers.{layer}.self_attn.q_proj").bias)


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"8-bit codes with a zero that is integer.*mlx does not hold; use `zero: sym"):
        write(prepared(everywhere(bits=8, group=32, zero="integer")), "mlx", tmp_path / "out")
    with pytest.raises(UserError, match=r"groups of 16.*multiple of 32"):
        write(prepared(everywhere(bits=4, group=16)), "mlx", tmp_path / "out")
    with pytest.raises(UserError, match=r"float16 scales.*scale_dtype: portable or bfloat16"):
        write(prepared(everywhere(bits=4, group=32, scale_dtype="float16")), "mlx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (Gemma2Config(**SIZES), "'gemma2' was not compared with mlx-lm"),
        (MistralConfig(**SIZES, sliding_window=16), "mistral with a sliding window"),
        (Gemma3TextConfig(**SIZES), "no period with one full layer"),  # its three layers are all sliding
    ],
    ids=str,
)
def test_what_mlx_does_not_compute_is_refused(config: Any, cause: str, tmp_path: Path) -> None:
    model = tt.prepare(random_model(config), Rtn(), [everywhere(bits=4, group=32)])
    with pytest.raises(UserError, match=cause):
        write(model, "mlx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_frequencies_are_where_mlx_looks_for_them(tmp_path: Path) -> None:
    """transformers 5 writes `rope_parameters`; mlx-lm takes 10000 where it finds no `rope_theta`."""
    rope = {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}
    model = tt.prepare(random_model(LlamaConfig(**SIZES, rope_parameters=rope)), Rtn(), [everywhere(bits=4, group=32)])
    write(model, "mlx", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"]["factor"] == 4.0


def test_an_exported_folder_is_not_taken_for_a_float_model(tmp_path: Path) -> None:
    """It has grids of its own, with a real zero, on which it is trained."""
    ours = prepared(everywhere(bits=4, group=32))
    write(ours, "mlx", tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    tiny.tokenizer().save_pretrained(tmp_path / "out")
    model, _ = tt.load(str(tmp_path / "out"), LrQat(rank=4))
    for name, layer in quant_layers(model).items():
        found, grid = layer.base.dequantize(torch.float32), layer.base.grid
        assert (grid.bits, grid.zero) == (4, "real")  # type: ignore[union-attr]
        assert torch.equal(found, quant_layers(ours)[name].base.dequantize(torch.float32))
