"""Codebooks against bitsandbytes: tables, codes, values, double quantization; NF3 and NF2 against normal quantiles."""

from statistics import NormalDist

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.layers.weights import CodebookWeight
from trimtab.quant import codebook
from trimtab.quant.grid import CodebookGrid

GROUPS = (32, 64, 128)


def weight(seed: int = 0, rows: int = 96, columns: int = 512) -> Tensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    # Rows of very different sizes, so that absmax values spread over the dynamic map.
    return w * torch.logspace(-2, 1, rows).unsqueeze(1)


def their_codes(packed: Tensor, shape: torch.Size) -> Tensor:
    """bitsandbytes puts the first of two codes in the high nibble."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 0xF], 1).flatten()[: shape.numel()].view(shape)


def near_a_boundary(x: Tensor, values: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Where x lies as good as in the middle between two table entries."""
    middles = (values[1:].double() + values[:-1].double()) / 2
    distance = (x.double().flatten().unsqueeze(1) - middles).abs().amin(1).view(x.shape)
    return distance < tolerance


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_codes_and_values_are_those_of_bitsandbytes(group: int, dtype: torch.dtype) -> None:
    w = weight().to(dtype)
    grid = CodebookGrid("nf4", group)
    packed, state = bnb.quantize_4bit(w, blocksize=group, quant_type="nf4")
    ours = CodebookWeight.quantize(w, grid)
    assert torch.equal(ours.read_absmax().flatten(), state.absmax.float())
    assert torch.equal(ours.integer_codes(), their_codes(packed, w.shape))
    # Both hold float32 products of the same table and absmax; bitsandbytes rounds them to the dtype it was given.
    assert torch.equal(ours.dequantize(dtype), bnb.dequantize_4bit(packed, state))


def test_nf4_of_a_weight_full_of_table_middles() -> None:
    """Ties between two entries, and the entries themselves, go where bitsandbytes sends them."""
    values = codebook.table(CodebookGrid("nf4", 64))
    w = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.zeros(33)]).view(1, 64)
    assert w.abs().max() == 1
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = CodebookWeight.quantize(w, CodebookGrid("nf4", 64))
    assert ours.integer_codes()[0, :16].tolist() == list(range(16))
    assert torch.equal(ours.integer_codes(), their_codes(packed, w.shape))
    assert torch.equal(ours.dequantize(torch.float32), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("rows", [16, 96])  # 256 absmax: one whole block of the second level; 1536: six
@pytest.mark.parametrize("group", [32, 64])
def test_double_quantization_is_that_of_bitsandbytes(rows: int, group: int) -> None:
    w = weight(1, rows)
    packed, state = bnb.quantize_4bit(w, blocksize=group, quant_type="nf4", compress_statistics=True)
    ours = CodebookWeight.quantize(w, CodebookGrid("nf4", group, double_quant=True))
    assert ours.absmax.dtype == torch.uint8
    assert ours.absmax_scale is not None
    assert ours.absmax_mean is not None
    assert ours.absmax_mean.shape == (1,)
    assert torch.equal(ours.integer_codes(), their_codes(packed, w.shape))
    torch.testing.assert_close(ours.absmax_mean[0], state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.absmax_scale.data, state.state2.absmax, rtol=1e-6, atol=0)
    # bitsandbytes' CPU encoder is not exact: within 1e-5 of a boundary it may take the entry that is further.
    absmax = w.view(rows, -1, group).abs().amax(-1)
    unit = (absmax - state.offset).flatten() / state.state2.absmax.repeat_interleave(256)[: absmax.numel()]
    table = bnb.create_dynamic_map()
    certain = ~near_a_boundary(unit, table, 2e-5)
    assert certain.float().mean() > 0.9
    assert torch.equal(ours.absmax.flatten()[certain], state.absmax[certain])
    ours_off, theirs_off = ((unit - table[c.flatten().long()]).abs() for c in (ours.absmax, state.absmax))
    assert (ours_off <= theirs_off + 1e-6).all()
    theirs = bnb.dequantize_4bit(packed, state).view(rows, -1, group)
    mine = ours.dequantize(torch.float32).view(rows, -1, group)
    same = certain.view(rows, -1)
    torch.testing.assert_close(mine[same], theirs[same], rtol=2e-6, atol=1e-9)
    assert (ours.read_absmax() - absmax).abs().max() < absmax.max() * 0.02


def test_the_dynamic_map_is_that_of_bitsandbytes_to_the_bit() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    assert torch.equal(codebook.expand_absmax(codes, torch.ones(1), torch.zeros(1))[0], bnb.create_dynamic_map())


def test_a_last_block_that_is_not_full() -> None:
    """300 absmax are one block of 256 and one of 44; bitsandbytes' own reading of our tensors gives our absmax."""
    absmax = weight(2, 30, 320).view(30, 10, 32).abs().amax(-1)
    codes, scale, mean = codebook.compress_absmax(absmax)
    assert scale.shape == (2,)
    centred = (absmax - mean).flatten()
    assert scale.tolist() == [centred[:256].abs().max().item(), centred[256:].abs().max().item()]
    table = bnb.create_dynamic_map()
    theirs = bnb.dequantize_blockwise(codes.flatten(), absmax=scale, code=table, blocksize=256) + mean
    torch.testing.assert_close(codebook.expand_absmax(codes, scale, mean).flatten(), theirs, rtol=1e-6, atol=0)
    # Each code is the nearest of the 256 values.
    unit = (centred / scale.repeat_interleave(256)[:300]).double()
    best = (unit.unsqueeze(1) - table.double()).abs().amin(1)
    chosen = (unit - table.double()[codes.flatten().long()]).abs()
    assert (chosen <= best + 1e-7).all()


def test_equal_absmax_everywhere() -> None:
    absmax = torch.full((4, 8), 0.5)
    codes, scale, mean = codebook.compress_absmax(absmax)
    assert torch.equal(codebook.expand_absmax(codes, scale, mean), absmax)
    assert (codebook.dynamic_map()[codes.long()] == 0).all()  # not whatever 0 / 0 is nearest to


def test_fp4_values_are_those_of_bitsandbytes() -> None:
    grid = CodebookGrid("fp4", 64)
    theirs = torch.unique(bnb.get_4bit_type("fp4", device="cpu"))  # 15 values: its 0 and -0 are two codes
    ours = codebook.table(grid)
    torch.testing.assert_close(torch.unique(ours), theirs, rtol=1e-7, atol=0)
    # Encoding picks the nearest value, so reconstructions are as close as bitsandbytes' everywhere.
    w = weight(3)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="fp4")
    mine = CodebookWeight.quantize(w, grid).dequantize(torch.float32)
    unit = w.view(96, -1, 64) / w.view(96, -1, 64).abs().amax(-1, keepdim=True)
    certain = ~near_a_boundary(unit, theirs).view_as(w)
    torch.testing.assert_close(mine[certain], bnb.dequantize_4bit(packed, state)[certain], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_tables_are_normal_quantiles(bits: int) -> None:
    """QLoRA, eq. 4: quantiles between 1 - 0.9677083 and 0.9677083, one more on the positive side, and an exact zero."""
    half, edge, normal = 2 ** (bits - 1), 0.9677083, NormalDist()

    def positive(n: int) -> list[float]:
        return [normal.inv_cdf(edge + (0.5 - edge) * i / n) for i in range(n)]

    expected = sorted([*positive(half), 0.0, *(-v for v in positive(half - 1))])
    expected = [v / max(expected) for v in expected]
    grid = CodebookGrid(f"nf{bits}", 64)  # type: ignore[arg-type]
    values = codebook.table(grid).tolist()
    assert values == pytest.approx(expected, abs=2e-7)
    if bits < 4:  # nobody else's constants: the quantiles to the last bit, on which stored files rest
        assert values == torch.tensor(expected, dtype=torch.float32).tolist()
    assert grid.bits == bits
    assert len(values) == 2**bits
    assert values == sorted(set(values))
    assert values[0] == -1
    assert values[-1] == 1
    assert values[half - 1] == 0


@pytest.mark.parametrize("name", ["nf4", "nf3", "nf2", "fp4"])
@pytest.mark.parametrize("group", [32, None])
def test_every_code_is_the_nearest_entry(name: str, group: int | None) -> None:
    grid, w = CodebookGrid(name, group), weight(4, 12, 96)  # type: ignore[arg-type]
    w[2] = 0
    kept = CodebookWeight.quantize(w, grid)
    absmax = w.view(12, -1, group or 96).double().abs().amax(-1, keepdim=True)
    candidates = codebook.table(grid).double() * absmax.unsqueeze(-1)
    best = (candidates - w.view(12, -1, group or 96, 1).double()).abs().amin(-1)
    values = kept.dequantize(torch.float32)
    chosen = (values.double() - w.double()).abs().view_as(best)
    assert (chosen <= best + absmax * 1e-6).all()
    assert (values[2] == 0).all()
    # The largest magnitude of a group is kept exactly, whatever its sign.
    w_NGg, v_NGg = w.view(12, -1, group or 96), values.view(12, -1, group or 96)
    where = w_NGg.abs().argmax(-1, keepdim=True)
    assert torch.equal(w_NGg.gather(-1, where), v_NGg.gather(-1, where))


def test_an_offset_is_added_after_the_table() -> None:
    w, grid = weight(5, 8, 64), CodebookGrid("nf4", 32)
    kept = CodebookWeight.quantize(w, grid)
    offset = torch.randn(8, 2, generator=torch.Generator().manual_seed(6))
    moved = kept.with_offset(offset)
    expected = kept.dequantize(torch.float32).double() + offset.double().repeat_interleave(32, 1)
    torch.testing.assert_close(moved.dequantize(torch.float32).double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(moved.integer_codes(), kept.integer_codes())


def test_a_codebook_grid_is_checked_when_it_is_made() -> None:
    with pytest.raises(UserError, match="nf5"):
        CodebookGrid("nf5")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="group"):
        CodebookGrid("nf4", 0)
    with pytest.raises(UserError, match="64 does not divide the 96"):
        CodebookWeight.quantize(weight(0, 4, 96), CodebookGrid("nf4", 64))


def test_a_table_is_made_once_and_serves_training_too() -> None:
    codebook._tensors.clear()
    with torch.inference_mode():
        made = codebook.table(CodebookGrid("nf4"))
    assert not made.is_inference()
    assert codebook.table(CodebookGrid("nf4")) is made is codebook.table(CodebookGrid("nf4", 32), torch.device("cpu"))
    assert codebook.dynamic_map() is codebook.dynamic_map()
    assert codebook.entries(CodebookGrid("nf4")) is made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert codebook.table(CodebookGrid("nf4")) is not made


def test_what_is_coded_is_no_part_of_a_graph() -> None:
    codes, absmax = codebook.to_codebook(weight(0, 4, 64).requires_grad_(), CodebookGrid("nf4", 32))
    assert not codes.requires_grad
    assert not absmax.requires_grad


def test_a_fake_table_is_not_kept() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    message = "torch no longer tells of its fake tensors' mode by _get_current_dispatch_mode"
    codebook._tensors.clear()
    with FakeTensorMode():
        assert isinstance(codebook.dynamic_map(), FakeTensor), message
    assert not isinstance(codebook.dynamic_map(), FakeTensor), message
    with FakeTensorMode():
        assert isinstance(codebook.dynamic_map(), FakeTensor), message
