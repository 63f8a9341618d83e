"""Every type of block that is a grid, k-quants among them, against the gguf package: values bit for bit."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import test_gguf
import torch
from gguf import GGMLQuantizationType as Kind
from test_gguf import KV_HEADS, LAYERS, PROJECTION, File, permuted
from torch import nn

import trimtab as tt
from exported import shake
from trimtab.errors import UserError
from trimtab.formats import get
from trimtab.formats.declaration import Layer
from trimtab.formats.export_size import export_sizes
from trimtab.formats.gguf.read_blocks import GRIDS, from_blocks
from trimtab.formats.gguf.write import save
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight
from trimtab.methods import LrQat, Peqa, QaHira, QaLora, Qat, Rtn
from trimtab.models.load import load, load_float
from trimtab.models.sources import open_source
from trimtab.models.targets import targets
from trimtab.models.transformers_bridge import quant_layers
from trimtab.quant.grid import Grid, k_quant
from trimtab.recipe.rules import parse_rules

HALVES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
"""Where the float16 numbers of a super-block stand; of the other types at 0, and at 2 where there is a minimum."""


def random_blocks(kind: Kind, rows: int, columns: int, seed: int = 0, scale: float = 0.01) -> np.ndarray:
    """Blocks of any bits, whose float16 numbers are of a usual size, of both signs, and sometimes zero."""
    draw = np.random.default_rng(seed)
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    raw = draw.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
    for at in HALVES.get(kind, (0, 2) if GRIDS[kind].zero == "real" else (0,)):
        numbers = draw.normal(0, scale, (len(raw), 1)) * (draw.random((len(raw), 1)) > 0.1)
        raw[:, at : at + 2] = numbers.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", [kind for kind in GRIDS if kind != Kind.MXFP4], ids=lambda kind: kind.name)
def test_blocks_of_any_bits(kind: Kind) -> None:
    blocks = random_blocks(kind, 24, 768)
    weight, exact = from_blocks(blocks, kind, 24), gguf.quants.dequantize(blocks, kind)
    assert (weight.shape, weight.grid) == ((24, 768), GRIDS[kind])
    assert np.array_equal(weight.dequantize(torch.float32).numpy(), exact)
    assert (weight.scale != 0).all(), "levels divide by it"
    base, adapter = LrQat(rank=2).build(weight, weight.grid)
    assert adapter is not None
    assert torch.equal(adapter.weight(base, torch.float32), weight.dequantize(torch.float32))


MIXED = {  # as Q4_K_M mixes them
    "attn_q": (Kind.Q4_K, (256, 256)),
    "attn_k": (Kind.Q5_K, (128, 256)),
    "attn_v": (Kind.Q6_K, (128, 256)),
    "attn_output": (Kind.Q3_K, (256, 256)),
    "ffn_gate": (Kind.Q2_K, (512, 256)),
    "ffn_up": (Kind.Q5_1, (512, 256)),
    "ffn_down": (Kind.Q4_K, (256, 512)),
}


class Mixed(File):
    """A tiny Llama of random blocks."""

    def add(self, name: str, module: str, kind: Kind, shape: tuple[int, ...]) -> None:
        if kind not in HALVES and kind != Kind.Q5_1:
            super().add(name, module, kind, shape)
            return
        blocks = random_blocks(kind, *shape, seed=len(self.blocks))  # type: ignore[misc]
        self.blocks[module] = (kind, blocks)
        heads = {"attn_q": test_gguf.HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        self.writer.add_tensor(name, permuted(blocks, heads) if heads else blocks, raw_dtype=kind)


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> File:
    for name, value in {"HIDDEN": 256, "HEAD": 64, "MLP": 512, "MATRICES": MIXED}.items():
        monkeypatch.setattr(test_gguf, name, value)
    return Mixed(tmp_path / "mixed.gguf")


SAME: list[dict[str, Any]] = [{"match": name, "grid": "same"} for name in ("model.embed_tokens", "lm_head", "*")]


def test_a_file_of_many_types_keeps_its_grids(mixed: File) -> None:
    model, _ = load(str(mixed.path), Rtn(), SAME, dtype=torch.float32)
    layers = quant_layers(model)
    assert len(layers) == 7 * LAYERS + 2 - 1
    for name, layer in layers.items():
        kind, _ = mixed.blocks[name]
        assert isinstance(layer.base, AffineWeight)
        assert layer.base.grid == GRIDS[kind]
        assert np.array_equal(layer.base.dequantize(torch.float32), mixed.values(name)), name
    assert type(model.get_submodule(f"model.layers.1.{PROJECTION['attn_output']}")) is nn.Linear, "float32 in the file"
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(model(ids).logits, load_float(str(mixed.path), dtype=torch.float32)(ids).logits)


def test_it_is_trained_on_them(mixed: File, tmp_path: Path) -> None:
    model, tokenizer = load(str(mixed.path), LrQat(rank=4), SAME, dtype=torch.float32)
    shake(model, 1.0)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        trained = model(ids).logits
    found = tt.fold(model)
    assert {layer.kind for layer in found} == {"bitwise"}
    assert sum(layer.moved.codes for layer in found)
    tt.save(model, tmp_path / "saved", tokenizer)
    again, _ = load(str(tmp_path / "saved"), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trained)


METHODS = {
    "lr-qat": LrQat(rank=4), "peqa": Peqa(), "qat": Qat(), "qa-hira": QaHira(), "qa-lora": QaLora(rank=2),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_what_was_trained_is_written_in_its_own_type(name: str, mixed: File, tmp_path: Path) -> None:
    """Same types, same size, all that was not tuned byte for byte, and to gguf the very numbers that were folded."""
    model, _ = load(str(mixed.path), METHODS[name], SAME, dtype=torch.float32)
    shake(model, 1.0)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        trained = model(ids).logits
    tt.fold(model)
    save(tmp_path / "out.gguf", model, None, name="other", source=mixed.path)
    before, after = (gguf.GGUFReader(path).tensors for path in (mixed.path, tmp_path / "out.gguf"))
    assert (tmp_path / "out.gguf").stat().st_size == mixed.path.stat().st_size
    changed = set()
    for old, new in zip(before, after, strict=True):
        assert (new.name, new.tensor_type, new.data_offset) == (old.name, old.tensor_type, old.data_offset)
        if not np.array_equal(new.data, old.data):
            changed.add(new.name.split(".")[-2])
    symmetric = {n for n, (kind, _) in MIXED.items() if GRIDS[kind].zero == "symmetric"}
    assert changed == (set(MIXED) - symmetric if name.startswith("qa-") else {*MIXED, "output"})
    again = load_float(str(tmp_path / "out.gguf"), dtype=torch.float32)
    for module, layer in quant_layers(model).items():
        assert torch.equal(again.get_submodule(module).weight, layer.base.dequantize(torch.float32)), module
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trained)


def test_what_a_method_cannot_train_on_is_kept_and_said(mixed: File, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = load(str(mixed.path), QaHira(), SAME)
    adapters = {n: layer.adapter for n, layer in quant_layers(model).items() if isinstance(layer, QuantLinear)}
    kept = {n for n, adapter in adapters.items() if adapter is None} - {"lm_head"}
    assert kept == {n for n in adapters if n.endswith(("v_proj", "o_proj"))} - {"model.layers.1.self_attn.o_proj"}
    why = "kept as in the file, and not trained: qa-hira acts in the zeros of a grid"
    said = [r.message.partition(": use")[0] for r in caplog.records if "not trained" in r.message]
    assert said == [
        f"model.layers.0.self_attn.v_proj, model.layers.1.self_attn.v_proj: {why}; q6_k has none",
        f"model.layers.0.self_attn.o_proj: {why}; q3_k has none",
        f"lm_head: {why}; int8 g32 symmetric has none",
    ]
    asked = [{"match": "*.v_proj", "grid": {"kquant": "q6_k"}}, *SAME]
    with pytest.raises(UserError, match=r"v_proj: qa-hira"):
        load(str(mixed.path), QaHira(), asked)
    with pytest.raises(UserError, match=r"v_proj: qa-hira"):
        load(str(mixed.path), QaHira(), [{"match": "*.v_proj", "grid": "same"}, {"match": "*", "grid": None}])


def test_a_k_quant_from_float(mixed: File, tmp_path: Path) -> None:
    """Each type from float weights, and its size as it was said before."""
    mixture = [
        {"match": f"*.{PROJECTION[n]}", "grid": {"kquant": kind.name.lower(), "range": "lp2"}}
        for n, (kind, _) in MIXED.items()
        if kind in HALVES
    ]
    rules = [*mixture, {"match": "*", "grid": None}]
    model = load_float(str(mixed.path), dtype=torch.float32)
    tt.prepare(model, Rtn(), rules)
    planned = targets(open_source(str(mixed.path)).layout(), Rtn(), parse_rules(rules))
    floats = open_source(str(mixed.path)).layout(dtype=torch.float32)
    size = export_sizes(floats, planned, Rtn(), dtype=torch.float32, only=["gguf"])["gguf"]
    save(tmp_path / "out.gguf", model, None, name="other", source=mixed.path)
    written = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    types = {t.name.split(".")[-2]: t.tensor_type for t in written if t.name.startswith("blk.0")}
    assert {n: types[n] for n, (kind, _) in MIXED.items() if kind in HALVES} == {
        n: kind for n, (kind, _) in MIXED.items() if kind in HALVES
    }
    again = load_float(str(tmp_path / "out.gguf"), dtype=torch.float32)
    for module, layer in quant_layers(model).items():
        assert torch.equal(again.get_submodule(module).weight, layer.base.dequantize(torch.float32)), module
    ours = {f"{n}.weight" for n in quant_layers(model)}
    names = {t.name for t in written}
    held = sum(t.n_bytes for t in written if t.tensor_type in HALVES)
    left = sum(t.numel() * 4 for n, t in floats.state_dict().items() if n not in ours)
    assert names
    assert size == held + left


@pytest.mark.parametrize(
    ("grid", "format_", "remedy"),
    [
        (Grid(3, 16), "gguf", "has portable scales, which gguf does not hold; use `scale_dtype: q3_k`"),
        (k_quant("q4_k"), "compressed-tensors", "has 4-bit codes with a zero that is real"),
        (k_quant("q6_k"), "mlx", "has groups of 16"),
        (k_quant("q4_k"), "mlx", "has q4_k scales, which mlx does not hold; use `scale_dtype: portable or bfloat16`"),
    ],
)
def test_the_remedy_where_a_format_and_two_levels_do_not_go_together(grid: Grid, format_: str, remedy: str) -> None:
    layer = Layer(name="up", kind="linear", shape=(64, 256), grid=grid)
    assert remedy in str(get(format_).form(layer, torch.bfloat16))


def test_what_is_more_than_moved_rows_is_converted(mixed: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers turns GPT-2's matrices: their codes are on no grid of the model's."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

    kind: Any = TENSOR_PROCESSORS["llama"]
    plain = kind.process

    def turned(self: Any, weights: Any, name: str, **options: Any) -> Any:
        found = plain(self, weights, name, **options)
        return found._replace(weights=found.weights.T) if "attn_output" in name else found

    monkeypatch.setattr(kind, "process", turned)
    model, _ = load(str(mixed.path), Rtn(), SAME, dtype=torch.float32)
    name = f"model.layers.0.{PROJECTION['attn_output']}"
    assert name not in quant_layers(model), "it is on none, so `same` leaves it in float"
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    assert np.array_equal(weight.numpy(), mixed.values(name).T)


def test_a_tied_head_has_its_embeddings_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = File(tmp_path / "tied.gguf", tied=True)
    source = open_source(str(tied.path))
    placed = {t.name: t for t in targets(source.layout(), Rtn(), parse_rules([SAME[0], SAME[2]]))}
    assert placed["lm_head"].kind == "tied"
    assert placed["lm_head"].grid == placed["model.embed_tokens"].grid == GRIDS[Kind.Q8_0]
