"""The equations of docs/design.md, sections 1 and 2, in float64: outputs and gradients written out, nothing of trimtab.

Every function takes plain numbers (levels, codes, scales, factors), the input x and the upstream gradient g = dL/dy,
and gives y, dL/dx, the gradient of every trained parameter by its own formula, and how far the closest value was from a
rounding boundary (float32 code can only agree where that is not within float32's rounding).

    G = dL/dW_hat = g^T x        H = the gradient of a dense update
    dB = dInner A^T, dA = B^T dInner, dM = dInner        dInner[a, c] = gain * sum of H over the tile (a, c)

Legend: B batch rows, N out features, K in features, g group size, G = K / g groups in a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Result(NamedTuple):
    """What one layer does with x and g."""

    y: Tensor
    dx: Tensor
    grads: dict[str, Tensor]
    weight: Tensor
    """W_hat (N, K), without an output update."""
    codes: Tensor
    """(N, K), as float64."""
    gap: float
    """Distance of the closest rounded value from a boundary, in steps."""
    clipped: int
    """Values that the clamp stopped."""


def stored(x: Tensor, dtype: str) -> Tensor:
    """x as a file of this dtype holds it: `portable` is exact in bfloat16 and in float16."""
    if dtype == "portable":
        return x.clamp(-65280, 65280).to(torch.bfloat16).to(torch.float16).to(x.dtype)
    return x.to(getattr(torch, dtype)).to(x.dtype)


def on_two_levels(x_NG: Tensor, kept: Tensor, low: int, high: int, groups: int) -> Tensor:
    """d n for x: of each super-block d is float16, n an integer within the limits, and never 0 unless the limits say so.

    d brings the number of largest magnitude to the integer of largest magnitude in `kept`, or if that is 0 to a limit.
    """
    out = torch.empty_like(x_NG)
    for i in range(x_NG.shape[0]):
        for at in range(0, x_NG.shape[1], groups):
            values, integers = x_NG[i, at : at + groups].tolist(), kept[i, at : at + groups].tolist()
            top = max(integers, key=abs) or max(low, high, key=abs)
            d = torch.tensor(max(values, key=abs) / top, dtype=torch.float32).to(torch.float16).item()
            for j, value in enumerate(values):
                n = round(value / d) if d else 0
                if n == 0 and low != 0:
                    n = 1 if value / d >= 0 else -1
                out[i, at + j] = d * min(max(n, low), high)
    return out


def spread(x_NG: Tensor, columns: int) -> Tensor:
    """(N, G) to (N, K): each entry over its group."""
    return x_NG.repeat_interleave(columns // x_NG.shape[1], 1)


def per_group(x_NK: Tensor, groups: int) -> Tensor:
    """(N, K) to (N, G): the sum over each group."""
    return x_NK.reshape(x_NK.shape[0], groups, -1).sum(-1)


def gap(u: Tensor) -> float:
    """How far the closest entry is from half way between two integers."""
    return (u - u.floor() - 0.5).abs().min().item()


@dataclass(frozen=True)
class Update:
    """delta_W[i, j] = scaling (* 1/p where the pool averages) * inner[i // m, j // p], with inner = B A or M."""

    factors: dict[str, Tensor]
    """{"A", "B"} or {"M"}, float64, as they act."""
    scaling: float
    pool: int
    repeat: int
    mean: bool

    @property
    def gain(self) -> float:
        return self.scaling / self.pool if self.mean else self.scaling

    def inner(self) -> Tensor:
        f = self.factors
        return self.gain * (f["M"] if "M" in f else f["B"] @ f["A"])

    def dense(self) -> Tensor:
        inner = self.inner()
        rows = torch.arange(inner.shape[0] * self.repeat) // self.repeat
        columns = torch.arange(inner.shape[1] * self.pool) // self.pool
        return inner[rows][:, columns]

    def blocks(self, groups: int) -> Tensor:
        """D (N, G): the value of delta_W on each quantization block, on which it must be constant."""
        dense = self.dense()
        first = dense[:, :: dense.shape[1] // groups]
        assert torch.equal(spread(first, dense.shape[1]), dense), "not constant on quantization blocks"
        return first

    def backward(self, h_NK: Tensor) -> dict[str, Tensor]:
        """Gradients of the factors from H, that of the dense update."""
        n, k = h_NK.shape
        tiles = h_NK.reshape(n // self.repeat, self.repeat, k // self.pool, self.pool).sum((1, 3)) * self.gain
        if "M" in self.factors:
            return {"delta.M": tiles}
        return {"delta.A": self.factors["B"].T @ tiles, "delta.B": tiles @ self.factors["A"].T}


def output_place(x: Tensor, g: Tensor, weight: Tensor, update: Update) -> Result:
    """y = x W_hat^T + delta_W x, for any frozen W_hat."""
    dense = update.dense()
    grads = update.backward(g.T @ x)
    return Result(x @ (weight + dense).T, g @ (weight + dense), grads, weight, weight, 1.0, 0)


def offset_real(
    x: Tensor, g: Tensor, values: Tensor, offset: Tensor, update: Update, held: Callable[[Tensor], Tensor]
) -> Result:
    """W_hat = values + held(o + D), as the file holds it; values are s * q, or absmax * table[q]."""
    columns, groups = values.shape[1], offset.shape[1]
    weight = values + spread(held(offset + update.blocks(groups)), columns)
    # dL/dD = sum over the group of G, and delta_W is D spread over the group: H has that sum, once for each group.
    grads = update.backward(g.T @ x)
    return Result(x @ weight.T, g @ weight, grads, weight, weight, 1.0, 0)


def offset_integer(
    x: Tensor, g: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, update: Update, bits: int
) -> Result:
    """o_eff = -s * clamp(round(z - D / s), 0, 2^b - 1): W_hat = s * (q - z')."""
    columns, groups, top = codes.shape[1], scale.shape[1], 2**bits - 1
    u = zero - update.blocks(groups) / scale
    rounded = u.round()
    inside = ((rounded >= 0) & (rounded <= top)).double()
    weight = spread(scale, columns) * (codes - spread(rounded.clamp(0, top), columns))
    grads = update.backward(spread(inside, columns) * (g.T @ x))
    return Result(x @ weight.T, g @ weight, grads, weight, codes, gap(u), int((inside == 0).sum()))


def levels_place(
    x: Tensor,
    g: Tensor,
    phi: Tensor,
    scale: Tensor,
    zero: Tensor,
    offset: Tensor | None,
    update: Update | None,
    bits: int,
) -> Result:
    """LR-QAT, eq. 8; PEQA without an update. `zero` is z (N, G), all zeros where there is an offset.

    ds = sum G * (q - z), since the scale inside Phi is frozen;  do = sum G;  H = inside * s * G.
    """
    columns, groups, top = phi.shape[1], scale.shape[1], 2**bits - 1
    u = phi if update is None else phi + update.dense()
    rounded = u.round()
    inside = ((rounded >= 0) & (rounded <= top)).double()
    q, s = rounded.clamp(0, top), spread(scale, columns)
    weight = s * (q - spread(zero, columns)) + (0 if offset is None else spread(offset, columns))
    upstream = g.T @ x
    grads = {"scale": per_group(upstream * (q - spread(zero, columns)), groups)}
    if offset is not None:
        grads["offset"] = per_group(upstream, groups)
    if update is not None:
        grads |= update.backward(inside * s * upstream)
    closest = gap(u) if update is not None else 1.0  # PEQA's levels are whole numbers
    return Result(x @ weight.T, g @ weight, grads, weight, q, closest, int((inside == 0).sum()))


def master_place(
    x: Tensor, g: Tensor, master: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None, bits: int
) -> Result:
    """LSQ: u = W / s + z or (W - o) / s;  dW = inside * G;  ds = sum G * (q - z - inside * W / s), or with (W - o) / s.

    Where o is trained it is inside the level too: do = sum G * (1 - inside).
    """
    columns, groups, top = master.shape[1], scale.shape[1], 2**bits - 1
    s, z = spread(scale, columns), spread(zero, columns)
    shifted = master if offset is None else master - spread(offset, columns)
    u = shifted / s + z
    rounded = u.round()
    inside = ((rounded >= 0) & (rounded <= top)).double()
    q = rounded.clamp(0, top)
    weight = s * (q - z) + (0 if offset is None else spread(offset, columns))
    upstream = g.T @ x
    grads = {"master": inside * upstream, "scale": per_group(upstream * (q - z - inside * shifted / s), groups)}
    if offset is not None:
        grads["offset"] = per_group(upstream * (1 - inside), groups)
    return Result(x @ weight.T, g @ weight, grads, weight, q, gap(u), int((inside == 0).sum()))


# ---- reading what is stored ----------------------------------------------------------------------------------------


def unpacked(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes of the packed layout, bit by bit from its description (see tests/test_packing.py)."""
    out = torch.zeros(packed.shape[0], columns, dtype=torch.float64)
    start = shift = 0
    for width in {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]:
        length = -(-columns // (8 // width))
        for j in range(columns):
            byte = packed[:, start + j % length].int() >> (j // length * width)
            out[:, j] += ((byte & ((1 << width) - 1)) << shift).double()
        start, shift = start + length, shift + width
    return out


def phi(kept: Tensor, storage: str, bits: int, zero: Tensor, columns: int) -> Tensor:
    """Levels as stored: (n + 0.5) / 2^(8-b), whole codes, or z + floats (`zero`: 2^(b-1) where it is no integer)."""
    if storage == "fixed8" and bits < 8:
        return (kept.double() + 0.5) / 2 ** (8 - bits)
    if storage in ("fixed8", "int"):
        return unpacked(kept, bits, columns)
    return kept.double() + spread(zero, columns)
