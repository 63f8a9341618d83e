"""Raw GGUF blocks of our codes against gguf's own reader: the same numbers, to the bit."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from trimtab.errors import UserError
from trimtab.formats.declaration import Form, Layer, Refusal
from trimtab.formats.gguf.blocks import block_type, to_blocks
from trimtab.formats.gguf.declare import Gguf
from trimtab.formats.gguf.read_blocks import from_blocks
from trimtab.layers.weights import AffineWeight
from trimtab.quant.grid import CodebookGrid, Grid, Range

N, K = 24, 256
# What each grid has to become. Anything else is refused.
TYPE = {
    **{("symmetric", b): "Q4_0" for b in (1, 2, 3, 4)},
    ("symmetric", 5): "Q5_0",
    **{("symmetric", b): "Q8_0" for b in (6, 7, 8)},
    **{("integer", b): "Q4_0" for b in (1, 2, 3)},
    ("integer", 4): "Q5_0",
    **{("integer", b): "Q8_0" for b in (5, 6, 7)},
    **{("real", b): "Q4_1" for b in (1, 2, 3, 4)},
    ("real", 5): "Q5_1",
}


def bits(x: Any) -> np.ndarray:
    """float32 values as they are in memory, so that the sign of a zero counts."""
    return np.asarray(x, dtype=np.float32).view(np.int32)


def random_layer(grid: Grid) -> AffineWeight:
    """Every code, every zero, and scales of both signs and many magnitudes."""
    random = torch.Generator().manual_seed(grid.bits)
    groups = K // (grid.group or K)
    codes = torch.randint(0, grid.top + 1, (N, K), generator=random, dtype=torch.uint8)
    codes[0], codes[1] = 0, grid.top
    sign = torch.randint(0, 2, (N, groups), generator=random) * 2.0 - 1
    scale = sign * torch.randn(N, groups, generator=random).exp2() * 2.0 ** torch.arange(-12, 4).repeat(N)[:N, None]
    scale = scale.to(torch.bfloat16).to(torch.float16).float()
    zero = torch.randint(0, grid.top + 1, (N, groups), generator=random).float()
    zero[:, 0] = torch.arange(N) % 2 * grid.top
    offset = torch.randn(N, groups, generator=random).to(grid.storage).float()
    range_ = Range(scale, zero if grid.zero == "integer" else None, offset if grid.zero == "real" else None)
    return AffineWeight.of_levels(codes.float(), range_, grid)


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize(("zero", "width"), TYPE, ids=str)
def test_blocks_read_back_as_the_weight(zero: Any, width: int, group: int | None) -> None:
    for scale_dtype in ("portable", "float16", "bfloat16"):
        grid = Grid(width, group, zero, scale_dtype)  # type: ignore[arg-type]
        weight = random_layer(grid)
        kind, blocks = to_blocks(weight.integer_codes(), weight.range(), grid)
        assert kind.name == TYPE[zero, width]
        assert kind == block_type(grid, K)
        type_ = Kind[kind.name]
        assert blocks.shape == gguf.quant_shape_to_byte_shape((N, K), type_)
        exact = gguf.quants.dequantize(blocks.numpy(), type_)
        assert np.array_equal(bits(exact), bits(weight.dequantize(torch.float32)))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_blocks_of_a_file_come_back_byte_for_byte(kind: Kind) -> None:
    values = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)
    blocks = gguf.quants.quantize(values, kind)
    weight = from_blocks(blocks, kind, N)
    written_kind, written = to_blocks(weight.integer_codes(), weight.range(), weight.grid)
    assert written_kind.name == kind.name
    assert np.array_equal(written.numpy(), blocks)


@pytest.mark.parametrize(
    ("grid", "cause"),
    [
        (Grid(8, 32, "integer"), "no GGUF type holds int8 g32 integer: use at most 7 bits"),
        (Grid(6, 32, "real"), "no GGUF type holds int6 g32 real: use at most 5 bits"),
        (Grid(4, 16), "group 16 is not a multiple"),
        (Grid(4, 48), "group 48 is not a multiple"),
        (Grid(4, 32, scale_dtype="float32"), "float32 scales; .* `scale_dtype: portable`"),
        (CodebookGrid("nf4", 64), "no table of nf4 values: use an affine grid"),
    ],
    ids=str,
)
def test_what_no_type_holds_is_refused(grid: Any, cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        block_type(grid)


def test_rows_that_blocks_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="172 input features are no multiple"):
        block_type(Grid(4, None), 172)


def test_what_the_format_declares_is_what_is_written() -> None:
    for (zero, width), name in TYPE.items():
        grid = Grid(width, 64, zero)  # type: ignore[arg-type]
        form = Gguf().form(Layer(name="x", kind="linear", shape=(N, K), grid=grid), torch.bfloat16)
        assert isinstance(form, Form)
        assert form.name == name
    for grid in (Grid(8, 32, "integer"), Grid(6, 32, "real"), Grid(4, 16), Grid(4, 32, scale_dtype="bfloat16")):
        form = Gguf().form(Layer(name="x", kind="linear", shape=(N, K), grid=grid), torch.bfloat16)
        assert isinstance(form, Refusal)


@pytest.mark.parametrize("what", ["scale", "offset"])
def test_numbers_that_float16_does_not_hold_are_refused(what: str) -> None:
    weight = random_layer(Grid(4, 32, "real", "bfloat16"))
    damaged = weight.range()._replace(**{f"{what}_NG": torch.full((N, K // 32), 3.0e-8)})
    with pytest.raises(UserError, match=rf"{N * K // 32} {what}s \(such as 3e-08\) are not exact in float16"):
        to_blocks(weight.integer_codes(), damaged, weight.grid)
