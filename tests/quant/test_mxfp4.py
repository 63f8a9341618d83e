"""MXFP4 against gguf, transformers' reader of gpt-oss and compressed-tensors: codes, scales and values, bit for bit."""

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from trimtab.errors import UserError
from trimtab.formats.gguf.blocks import to_powers
from trimtab.formats.gguf.read_blocks import GRIDS, from_blocks
from trimtab.layers.specs import from_spec
from trimtab.layers.weights import CodebookWeight, quantize
from trimtab.models.gptq import Gptq
from trimtab.models.gptq import quantize as by_gptq
from trimtab.quant import codebook, mxfp4
from trimtab.quant.grid import CodebookGrid, of_width

GRID = CodebookGrid("mxfp4", 32)
KIND = gguf.GGMLQuantizationType.MXFP4


def weight(rows: int = 24, columns: int = 256) -> Tensor:
    """Rows of very different sizes, a block of zeros among them, and some that lie on values, and between two."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    w *= torch.logspace(-30, 30, rows).unsqueeze(1)
    w[0, :32] = 0
    w[1, :32] = torch.arange(32) * 0.25 - 4
    return w


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def bits(t: Tensor) -> Tensor:
    """So that 0 is not -0."""
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def test_rounding_is_that_of_the_standard() -> None:
    """Scales as gguf sets them; codes are nearest, which gguf's are, too: where two are as near, either."""
    w = weight()
    ours = quantize(w, GRID)
    assert isinstance(ours, CodebookWeight)
    assert ours.absmax.dtype == torch.uint8
    theirs = gguf.quants.quantize(w.numpy(), KIND).reshape(-1, 17)
    assert torch.equal(ours.absmax.flatten(), torch.from_numpy(theirs[:, 0].copy()))
    values = torch.from_numpy(gguf.quants.dequantize(theirs.reshape(24, -1), KIND))
    mine = ours.dequantize(torch.float32)
    assert torch.equal((mine - w).abs(), (values - w).abs())
    assert (mine == values).float().mean() > 0.99
    assert (ours.integer_codes() < 15).all(), "-0 is read, and never made"


def test_a_gguf_tensor_is_read_and_written_bit_for_bit() -> None:
    raw = random_bytes(6, 8, 17)
    raw[..., 0] = torch.arange(48, dtype=torch.uint8).view(6, 8) * 5
    raw = raw.flatten(1)
    read = from_blocks(raw.numpy(), KIND, 6)
    assert isinstance(read, CodebookWeight)
    assert read.grid == GRIDS[KIND] == GRID
    theirs = gguf.quants.dequantize(raw.numpy(), KIND)
    assert np.array_equal(read.dequantize(torch.float32).numpy(), theirs)
    assert torch.equal(to_powers(read.integer_codes(), read.absmax), raw)
    raw[0, 0] = mxfp4.NAN
    with pytest.raises(UserError, match="exponent is 255, which stands for no number"):
        from_blocks(raw.numpy(), KIND, 6)


def test_experts_of_gpt_oss_are_read_and_written_bit_for_bit() -> None:
    """blocks (experts, N, G, 16) and scales (experts, N, G); transformers makes (experts, K, N) of them."""
    blocks, scales = random_bytes(3, 10, 4, 16), random_bytes(3, 10, 4) // 2 + 64
    codes = mxfp4.from_blocks(blocks)
    assert codes.shape == (3, 10, 128)
    table, size = codebook.entries(GRID), mxfp4.scales(scales)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
        ours = torch.stack([codebook.from_codebook(q, s, table) for q, s in zip(codes, size, strict=True)]).to(dtype)
        assert torch.equal(bits(ours), bits(theirs))
        stored = [CodebookWeight.of_powers(q, e).dequantize(dtype) for q, e in zip(codes, scales, strict=True)]
        assert torch.equal(bits(torch.stack(stored)), bits(theirs))
    assert torch.equal(mxfp4.to_blocks(codes), blocks)


def test_compressed_tensors_unpacks_the_same_values() -> None:
    packed, exponents = random_bytes(5, 64), random_bytes(5, 4) // 2 + 64
    read = CodebookWeight.of_powers(mxfp4.from_blocks(packed.view(5, 4, 16)), exponents)
    values = unpack_fp4_from_uint8(packed, 5, 128, torch.bfloat16)
    theirs = values * decompress_mx_scale(exponents).repeat_interleave(32, 1)
    assert torch.equal(bits(read.dequantize(torch.bfloat16)), bits(theirs))


def test_scales_are_exact_powers_at_both_ends() -> None:
    e = torch.arange(255, dtype=torch.uint8)
    wanted = [2.0 ** (i - 127) for i in range(255)]
    assert mxfp4.scales(e).tolist() == wanted
    assert torch.equal(mxfp4.exponents_of(mxfp4.scales(e))[1:], e[1:])
    edges = torch.tensor([0.0, 2.0**-126, 2.0**-124, 5.999, 6.0, 7.999, 8.0, torch.finfo(torch.float32).max])
    assert mxfp4.exponents(edges).tolist() == [0, 0, 1, 127, 127, 127, 128, 252]


def test_a_grid_has_one_form() -> None:
    for wrong in ({"group": 64}, {"group": None}, {"group": 32, "double_quant": True}):
        with pytest.raises(UserError, match=r"write {codebook: mxfp4, group: 32}"):
            CodebookGrid("mxfp4", **wrong)  # type: ignore[arg-type]
    assert of_width(GRID, 4) == GRID
    assert GRID.describe() == "mxfp4 g32"


def test_it_is_laid_out_as_it_is_stored() -> None:
    made = quantize(weight(), GRID)
    empty = from_spec(made.spec())
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in made.state_dict().items()
    }


def test_gptq_starts_it() -> None:
    w, x = weight()[8:16], torch.randn(300, 256, generator=torch.Generator().manual_seed(2))
    w = w / w.abs().amax(1, keepdim=True)
    hessian = x.T @ x / len(x)
    error, options = {}, Gptq(tokens=torch.zeros(1, 1, dtype=torch.int64))
    for name, made in (("rtn", quantize(w, GRID)), ("gptq", by_gptq(w, hessian, GRID, options))):
        assert made.grid == GRID
        error[name] = ((made.dequantize(torch.float32) - w) @ x.T).square().mean().item()
    assert error["gptq"] < 0.9 * error["rtn"]
