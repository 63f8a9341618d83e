"""Packing: every width and awkward row lengths, against a layout written bit by bit from its description."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.quant.int32_packing import pack_int32
from trimtab.quant.packing import owned, pack, row_bytes, unpack

WIDTHS = range(1, 9)
LENGTHS = (1, 2, 3, 7, 8, 9, 172, 576)
# From the module's docstring: parts of 8, 4, 2 and 1 bits, the low bits in the widest part, which comes first.
PARTS = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def random_codes(bits: int, rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, length), generator=generator, dtype=torch.int64).to(torch.uint8)


def described(row: list[int], bits: int) -> list[int]:
    """One row packed as the docstring says, one bit field at a time."""
    out, shift = [], 0
    for width in PARTS[bits]:
        segments = 8 // width
        length = -(-len(row) // segments)
        packed = [0] * length
        for j, code in enumerate(row):
            field = (code >> shift) & ((1 << width) - 1)
            packed[j % length] |= field << (j // length * width)
        out += packed
        shift += width
    return out


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("length", LENGTHS)
def test_round_trip_size_and_layout(bits: int, length: int) -> None:
    codes = random_codes(bits, 5, length)
    codes[0], codes[1] = 0, (1 << bits) - 1
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, row_bytes(bits, length))
    assert packed.tolist() == [described(row, bits) for row in codes.tolist()]
    read = unpack(packed, bits, length)
    assert read.dtype == torch.uint8
    assert read.is_contiguous()
    assert torch.equal(read, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_wastes_less_than_a_byte_a_part(bits: int) -> None:
    for length in LENGTHS:
        least = -(-length * bits // 8)
        assert least <= row_bytes(bits, length) < least + len(PARTS[bits])
    # Where every part divides, not one bit is wasted.
    assert row_bytes(bits, 576) == 576 * bits // 8


def test_four_bits_is_low_nibbles_then_high_nibbles() -> None:
    # c0 c1 c2 c3 | c4 c5 c6 c7: byte j = c_j | c_(j+4) << 4
    codes = torch.tensor([[0x1, 0x2, 0x3, 0x4, 0xA, 0xB, 0xC, 0xD]], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [[0xA1, 0xB2, 0xC3, 0xD4]]


def test_two_bits_is_four_segments() -> None:
    codes = torch.tensor([[1, 2, 3, 0, 2, 2, 1, 3]], dtype=torch.uint8)
    assert pack(codes, 2).tolist() == [[0b01_10_11_01, 0b11_10_00_10]]


def test_three_bits_is_two_low_bits_then_a_plane_of_high_bits() -> None:
    codes = torch.tensor([[5, 2, 7, 0]], dtype=torch.uint8)
    assert pack(codes, 3).tolist() == [[0b00_11_10_01, 0b0000_0101]]


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_never_share_a_byte(bits: int) -> None:
    codes = random_codes(bits, 4, 7)
    packed = pack(codes, bits)
    changed = codes.clone()
    changed[2] = ~changed[2] & ((1 << bits) - 1)
    moved = (pack(changed, bits) != packed).any(1)
    assert moved.tolist() == [False, False, True, False]
    # A shard of rows is the pack of those rows.
    assert torch.equal(pack(codes[1:3], bits), packed[1:3])
    assert torch.equal(unpack(packed[1:3].clone(), bits, 7), codes[1:3])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.integers(1, 8), rows=st.integers(1, 4), length=st.integers(1, 70))
def test_any_codes_survive(data: st.DataObject, bits: int, rows: int, length: int) -> None:
    codes = random_codes(bits, rows, length, data.draw(st.integers(0, 2**31)))
    assert torch.equal(unpack(pack(codes, bits), bits, length), codes)


def test_eight_bits_is_no_copy() -> None:
    packed = pack(random_codes(8, 2, 5), 8)
    assert unpack(packed, 8, 5).data_ptr() == packed.data_ptr()


def test_unpacking_leaves_the_bytes_alone() -> None:
    for bits in WIDTHS:
        packed = pack(random_codes(bits, 3, 9), bits)
        before = packed.clone()
        unpack(packed, bits, 9)
        assert torch.equal(packed, before)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("length", [1, 5, 10, 11, 31, 32, 33, 64, 96, 100])
def test_dense_words_are_one_long_number(bits: int, length: int) -> None:
    """A row is the integer whose digits to the base 2^bits are its codes; its words are signed as int32 has them."""
    codes = random_codes(bits, 4, length)
    codes[0], codes[1] = 0, (1 << bits) - 1
    words = -(-length * bits // 32)
    rows = [sum(code << (i * bits) for i, code in enumerate(row)) for row in codes.tolist()]
    expected = [list(struct.unpack(f"<{words}i", row.to_bytes(4 * words, "little"))) for row in rows]
    for dtype in (torch.uint8, torch.int32, torch.int64):
        packed = pack_int32(codes.to(dtype), bits)
        assert packed.dtype == torch.int32
        assert packed.tolist() == expected


def test_what_is_kept_lies_row_by_row_in_memory_of_its_own() -> None:
    """A piece would keep the whole alive, and a file would hold all of it."""
    whole = torch.arange(12.0).view(3, 4)
    assert owned(whole) is whole
    for part in (whole[1:], whole[:, 1:], whole.t(), whole[:1].expand(3, 4), whole[:2]):
        kept = owned(part)
        assert torch.equal(kept, part)
        assert kept.is_contiguous()
        assert kept.untyped_storage().nbytes() == 4 * kept.numel()
        assert kept.data_ptr() != part.data_ptr()
