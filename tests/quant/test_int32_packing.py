"""Codes in 32-bit words, against the same bits written out as a string."""

import pytest
import torch

from trimtab.quant.int32_packing import pack_int32, unpack_int32


def words_of(codes: list[int], bits: int) -> list[int]:
    """By the layout: a row's codes one behind another, lowest bits first, cut into signed words."""
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    stream += "0" * (-len(stream) % 32)
    words = [int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("columns", [1, 5, 32, 33, 43, 64])
@pytest.mark.parametrize("bits", range(1, 9))
def test_words_and_back(bits: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(bits * columns)
    codes = torch.randint(2**bits, (3, columns), generator=draw)
    codes[0] = 2**bits - 1  # every sign bit is set
    words = pack_int32(codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [words_of(row, bits) for row in codes.tolist()]
    found = unpack_int32(words, bits, columns)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), codes)
