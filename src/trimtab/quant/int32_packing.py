"""Codes packed densely into 32-bit words, lowest bits first, a code running over a word's end where it must.

    3 bits    word 0   c0 | c1 | .. | c9 | low two bits of c10
              word 1   high bit of c10 | c11 | ..

32 codes of b bits are b words. GPTQ packs so along K of a transposed matrix, MLX along each row.

Legend: R rows, K codes in a row, b bits.
"""

import torch
from torch import Tensor

_WORD = 32


def pack_int32(codes_RK: Tensor, bits: int) -> Tensor:
    """Pack rows of codes: integers (R, K), each below 2**bits, to int32 (R, ceil(K bits / 32))."""
    k = codes_RK.shape[1]
    blocks_RBC = torch.nn.functional.pad(codes_RK, (0, -k % _WORD)).unflatten(1, (-1, _WORD))
    packed = torch.zeros(*blocks_RBC.shape[:2], bits, dtype=torch.int64, device=codes_RK.device)
    for i in range(_WORD):
        word, shift = divmod(i * bits, _WORD)
        code = blocks_RBC[..., i].to(torch.int64)
        packed[..., word] |= (code << shift) & 0xFFFFFFFF
        if shift + bits > _WORD:
            packed[..., word + 1] |= code >> (_WORD - shift)
    return packed.flatten(1)[:, : -(-k * bits // _WORD)].to(
        torch.int32
    )  # the lower half: what exceeds 2^31 turns negative


def unpack_int32(words_RW: Tensor, bits: int, codes: int) -> Tensor:
    """The inverse of `pack_int32`: int32 (R, W) to the first `codes` codes of each row, uint8 (R, codes)."""
    words = torch.nn.functional.pad(words_RW, (0, -words_RW.shape[1] % bits)).to(torch.int64) & 0xFFFFFFFF
    blocks_RBb = words.unflatten(1, (-1, bits))
    found = torch.empty(*blocks_RBb.shape[:2], _WORD, dtype=torch.uint8, device=words_RW.device)
    for i in range(_WORD):
        word, shift = divmod(i * bits, _WORD)
        code = blocks_RBb[..., word] >> shift
        if shift + bits > _WORD:
            code |= blocks_RBb[..., word + 1] << (_WORD - shift)
        found[..., i] = (code & ((1 << bits) - 1)).to(torch.uint8)
    return found.flatten(1)[:, :codes]
