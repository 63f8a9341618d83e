"""What is trained, and where it acts.

    output   y = x W_hat^T + delta_W x                                         LoRA, QLoRA, LoftQ, Q-BaRA
    offset   o' = store(o + D_NG), with D constant on each quantization block  QA-LoRA, QA-HiRA, QA-BLoRA
    levels   u' = u + delta, then round, clamp, scale                          LR-QAT; PEQA (no delta: scales only)
    master   u = W / s + z from a trained float W                              full QAT

`adapter` says what each of them must answer. Folding calls the same functions as forward, so levels and offsets fold to
the bit.

Trained scales and offsets are float32 masters that pass through the grid's storage dtype wherever they act.

Legend: B batch rows, N out features, K in features, g group size, G = K / g groups in a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.kernels import channel, dequantize, shifted
from trimtab.kernels.dequantize import Levels
from trimtab.kernels.levels import from_levels
from trimtab.layers import intact
from trimtab.layers.adapter import Adapter, Fold, FoldKind
from trimtab.layers.deltas import DeltaShape, PooledDelta
from trimtab.layers.weights import AffineWeight, CodebookWeight, DenseWeight, Spec, Weight
from trimtab.quant.grid import AnyGrid, Grid, Range, round_clamp, to_levels
from trimtab.quant.opaque import moved_zeros
from trimtab.quant.packing import owned


class DeltaOutput(Adapter):
    """delta_W x beside the product: LoRA and its kin. Stays an adapter, or merges into a dense copy of the weight."""

    place = "output"
    kind = "output"
    moves_weight = False
    delta: PooledDelta

    def __init__(self, delta: PooledDelta) -> None:
        super().__init__()
        self.delta = delta

    def output(self, base: Weight, x_BK: Tensor) -> Tensor:
        """delta_W x."""
        y: Tensor = self.delta(x_BK)
        return y

    def merged(self, base: Weight, dtype: torch.dtype) -> Tensor:
        """W_hat + delta_W, added in float32."""
        intact.on(next(base.parameters()).device, self, "the weight that it is added to")
        return (base.dequantize(torch.float32) + self.delta.dense()).to(dtype)

    def idle(self, base: Weight) -> bool:
        """Without an update."""
        return self.delta.idle()

    def fold(self, base: Weight) -> Fold:
        """A dense bfloat16 copy: no grid holds W_hat + delta_W. The error is that copy's own rounding."""
        with torch.no_grad():
            exact = self.merged(base, torch.float32)
            dense = DenseWeight(exact.to(base.weight.dtype if isinstance(base, DenseWeight) else torch.bfloat16))
            error = (dense.weight - exact).norm() / exact.norm().clamp_min(1e-30)
        return Fold(dense, "algebraic", error.item())

    @classmethod
    def folded(cls, weight: Spec) -> Spec:
        """Dense, in bfloat16 unless the base is dense in another dtype."""
        dtype = weight["dtype"] if weight["kind"] == "dense" else "bfloat16"
        return {"kind": "dense", "shape": weight["shape"], "dtype": dtype}


class DeltaOffset(Adapter):
    """An update that is constant on every quantization block moves the block's zero; codes and scales stay.

        real zero, NF4   o_eff = store(o + D)
        integer zero     o_eff = -s * clamp(ste_round(z - D / s), 0, 2^b - 1)
        y = x dequantize(q, s, o_eff.detach())^T + Sum_g(x.detach()) (o_eff - o_eff.detach())^T

    The second term is zero and carries dD = g^T Sum_g(x), so no N x K gradient is ever formed.
    """

    place = "offset"
    reads_rounded_inputs = True
    delta: PooledDelta

    def __init__(self, delta: PooledDelta) -> None:
        super().__init__()
        self.delta = delta
        self.kind = "offset" if delta.M is None else "blocks"

    def _effective(self, base: Weight) -> tuple[Tensor, Tensor | None]:
        """(o_eff, integer zeros), both (N, G) float32 with gradients; zeros are None for real offsets."""
        intact.on(next(base.parameters()).device, self, "the weight that it moves")
        group = base.shape[1] // _groups(base)
        d_NG = self.delta.per_group(group)
        if isinstance(base, CodebookWeight):
            return (d_NG if base.offset is None else base.offset + d_NG), None
        assert isinstance(base, AffineWeight)
        range_ = base.range()
        if range_.offset_NG is not None:
            return base.stored_offset(range_.offset_NG + d_NG), None
        assert range_.zero_NG is not None
        zero = moved_zeros(range_.zero_NG, d_NG, range_.scale_NG, base.grid.top)
        return -range_.scale_NG * zero, zero

    def weight(self, base: Weight, dtype: torch.dtype, *, reuse: bool = False) -> Tensor:
        """The base with its zeros moved; carries no gradient."""
        with torch.no_grad():
            o_eff, zero = self._effective(base)
            if isinstance(base, CodebookWeight):
                return base.dequantize(dtype, reuse=reuse, offset_NG=o_eff)
            assert isinstance(base, AffineWeight)
            return base.dequantize(dtype, reuse=reuse, range_=_moved(base, o_eff, zero))

    def output(self, base: Weight, x_BK: Tensor) -> Tensor | None:
        """Exact zeros that carry the gradient of the offsets; nothing where none is wanted."""
        if not torch.is_grad_enabled():
            return None
        o_eff, _ = self._effective(base)
        summed_BG = x_BK.detach().unflatten(-1, (_groups(base), -1)).sum(-1)
        return F.linear(summed_BG, (o_eff - o_eff.detach()).to(x_BK.dtype))

    def merged(self, base: Weight, dtype: torch.dtype) -> Tensor:
        """`weight`, with the gradient of the offsets."""
        weight = self.weight(base, dtype)
        if not torch.is_grad_enabled():
            return weight
        o_eff, _ = self._effective(base)
        zeros_NG = o_eff - o_eff.detach()
        return weight + zeros_NG.repeat_interleave(base.shape[1] // zeros_NG.shape[1], 1).to(dtype)

    def idle(self, base: Weight) -> bool:
        """Without an update."""
        return self.delta.idle()

    def fold(self, base: Weight) -> Fold:
        """The same codes and scales with moved zeros: bitwise."""
        with torch.no_grad():
            o_eff, zero = self._effective(base)
            if isinstance(base, CodebookWeight):
                return Fold(base.with_offset(o_eff), "bitwise", 0.0)
            assert isinstance(base, AffineWeight)
            moved = AffineWeight(base.codes, _moved(base, o_eff, zero), base.grid, base.shape[1], base.storage)
            return Fold(moved, "bitwise", 0.0)

    @classmethod
    def is_lora(cls, grid: AnyGrid | None) -> bool:
        """Unless it is rounded to integer zeros."""
        return not (isinstance(grid, Grid) and grid.zero == "integer")

    @classmethod
    def folded(cls, weight: Spec) -> Spec:
        """The same, and a codebook weight has offsets then."""
        return {**weight, "offset": True} if weight["kind"] == "codebook" else weight


class DeltaLevels(Adapter):
    """LR-QAT, eq. 8: W_hat = s * (clamp(ste_round(Phi + delta), 0, 2^b - 1) - z), with A, B and the outer scale trained.

    With a real zero W_hat = s * q + o and o is trained too. Without a delta this is PEQA: codes frozen, s (and o) trained.
    Because the scale inside Phi is frozen, ds = sum over the group of dL/dW_hat * (q - z); it is not LSQ's.
    """

    place = "levels"
    acts_in_codes = True

    def __init__(self, delta: PooledDelta | None, base: AffineWeight) -> None:
        super().__init__()
        self.delta, self._clipped = delta, channel.Clipped()
        self.scale, self.offset = _masters(base)
        self.kind = "scales" if delta is None else "levels"

    def weight_parameters(self) -> tuple[nn.Parameter, ...]:
        """Everything: the factors, the scales and the offsets."""
        return tuple(self.parameters())

    def _about(self, base: AffineWeight) -> Levels:
        """The levels with the factors of an ordinary low-rank shift, and scales and zeros as they act.

        What passes through bfloat16 does so in the kernels, which can then multiply it on tensor cores.
        """
        range_ = _trained_range(base, self.scale, self.offset)
        if self.delta is None:
            return base.described(range_)
        narrow = self.delta.shape.dtype == "bfloat16"
        return base.described(range_, self.delta.as_plain(acting=not narrow), self.delta.shape.gain, narrow)

    def _levels(self, base: AffineWeight) -> Tensor:
        levels = base.levels()
        return levels if self.delta is None else self.delta.added_to(levels)

    def weight(self, base: Weight, dtype: torch.dtype, *, reuse: bool = False) -> Tensor:
        """s * (q - z) of the shifted levels, whose arithmetic autocast leaves in float32: its operators see to that."""
        assert isinstance(base, AffineWeight)
        if not base.packed:
            range_ = _trained_range(base, self.scale, self.offset)
            return from_levels(self._levels(base), range_, base.grid, dtype)
        about = self._about(base)
        if torch.is_grad_enabled():
            return shifted.weight(about, dtype, base.shape[1])
        out = base.result(dtype, None, reuse)
        dequantize.levels(out, *about)
        return out

    def weight_gradients(
        self, base: Weight, grad_NK: Tensor, wanted: tuple[nn.Parameter, ...]
    ) -> tuple[Tensor | None, ...]:
        """Those of the fused kernel, carried on from what acts (rounded, pooled) to what is trained."""
        assert isinstance(base, AffineWeight)
        if not base.packed:
            return super().weight_gradients(base, grad_NK, wanted)
        about = self._differentiable(base)
        with torch.no_grad():
            return self._carried_on(about, shifted.gradients(about, grad_NK), wanted)

    def _differentiable(self, base: AffineWeight) -> Levels:
        """`_about`, with a graph where gradients of what acts are not those of what is trained as they stand."""
        with torch.set_grad_enabled(self.delta is not None and not self.delta.plain):
            return self._about(base)

    def _carried_on(
        self, about: Levels, found: tuple[Tensor | None, ...], wanted: tuple[nn.Parameter, ...]
    ) -> tuple[Tensor | None, ...]:
        """From the gradients of what acts (A, B, scale, offset) to those of what is trained: straight through rounding."""
        of: dict[int, Tensor | None] = {id(self.scale): found[2], id(self.offset): found[3]}
        if self.delta is not None:
            of.update(self.delta.gradients_of_plain((about.a_RK, about.b_NR), found[:2]))
        return tuple(None if (g := of[id(p)]) is None else g.to(p.dtype) for p in wanted)

    def uses_output(self, base: Weight, dtype: torch.dtype) -> bool:
        """Per channel, LR-QAT's gradients need no dL/dW (see `kernels.channel`)."""
        if not isinstance(base, AffineWeight) or not base.packed or self.delta is None:
            return False
        if base.scale.shape[1] > 1 or self._clipped.many(base.shape[0] * base.shape[1]):
            return False
        return channel.fits(base.codes, dtype)

    def gradients_from_output(
        self, base: Weight, grad_BN: Tensor, x_BK: Tensor, y_BN: Tensor, wanted: tuple[nn.Parameter, ...]
    ) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
        """As long as few levels are clipped."""
        assert isinstance(base, AffineWeight)
        about = self._differentiable(base)
        with torch.no_grad():
            weight = base.result(grad_BN.dtype, None, True)
            clipped = channel.weight_and_clipped(about, weight)
            if not channel.few(clipped, weight.numel()):
                return weight, None
            found = channel.gradients(about, grad_BN, x_BK, y_BN, clipped, self._clipped)
            return weight, self._carried_on(about, found, wanted)

    def idle(self, base: Weight) -> bool:
        """Without a shift, and at the stored scales."""
        assert isinstance(base, AffineWeight)
        return (self.delta is None or self.delta.idle()) and _at_stored(base, self.scale, self.offset)

    def fold(self, base: Weight) -> Fold:
        """Plain b-bit codes with the trained scales: bitwise."""
        assert isinstance(base, AffineWeight)
        with torch.no_grad():
            range_ = _trained_range(base, self.scale, self.offset)
            if base.packed:
                codes = torch.empty(base.shape, dtype=torch.uint8, device=base.codes.device)
                dequantize.levels(codes, *self._about(base))
            else:
                codes = round_clamp(self._levels(base), base.grid.top).to(torch.uint8)
            return Fold(base.with_codes(codes, range_), "bitwise", 0.0)

    @classmethod
    def folded(cls, weight: Spec) -> Spec:
        """Whole codes."""
        return {**weight, "storage": "int"}

    def graph_bytes(self, base: Weight, dtype: torch.dtype) -> int:
        """Of float levels; packed ones go through the fused kernels."""
        return 0 if isinstance(base, AffineWeight) and base.packed else _graph_bytes(dtype)


class MasterLevels(Adapter):
    """Full QAT (LSQ): u = W / s + z with a trained float W, so that ds = sum G * (q - z - inside * W / s)."""

    place = "master"
    kind = "master"
    acts_in_codes = True

    def __init__(self, weight_NK: Tensor, base: AffineWeight) -> None:
        super().__init__()
        self.delta = None
        self.master = nn.Parameter(owned(weight_NK.float()))
        self.scale, self.offset = _masters(base)

    def weight_parameters(self) -> tuple[nn.Parameter, ...]:
        """The master weight, the scales and the offsets."""
        return tuple(self.parameters())

    def _parts(self, base: AffineWeight) -> tuple[Tensor, Range]:
        range_ = _trained_range(base, self.scale, self.offset)
        master = intact.trained("master", self.master, base.shape, base.codes.device)
        return to_levels(master, range_, base.grid), range_

    def weight(self, base: Weight, dtype: torch.dtype, *, reuse: bool = False) -> Tensor:
        """The master weight rounded to the grid."""
        assert isinstance(base, AffineWeight)
        levels, range_ = self._parts(base)
        return from_levels(levels, range_, base.grid, dtype)

    @torch.no_grad()
    def idle(self, base: Weight) -> bool:
        """Where the master rounds to the stored codes, at the stored scales."""
        assert isinstance(base, AffineWeight)
        codes = self.fold(base).weight
        assert isinstance(codes, AffineWeight)
        return _at_stored(base, self.scale, self.offset) and torch.equal(codes.codes, base.codes)

    @torch.no_grad()
    def frozen(self, base: Weight) -> tuple[Weight, Adapter | None]:  # type: ignore[override]
        """Codes of its own where it has moved: an eighth of a copy of the master, at most a quarter."""
        return (base if self.idle(base) else self.fold(base).weight), None

    def fold(self, base: Weight) -> Fold:
        """Plain b-bit codes with the trained scales: bitwise."""
        assert isinstance(base, AffineWeight)
        with torch.no_grad():
            levels, range_ = self._parts(base)
            codes = round_clamp(levels, base.grid.top).to(torch.uint8)
            return Fold(base.with_codes(codes, range_), "bitwise", 0.0)

    @classmethod
    def folded(cls, weight: Spec) -> Spec:
        """Whole codes."""
        return {**weight, "storage": "int"}

    def graph_bytes(self, base: Weight, dtype: torch.dtype) -> int:
        """Of levels, and the gradients of W / s."""
        return _graph_bytes(dtype) + 4

    def spec(self) -> dict[str, Any]:
        """Only the place: the master has the base's shape."""
        return {"place": self.place}


def _graph_bytes(dtype: torch.dtype) -> int:
    """Levels, rounded levels, codes, whether they were clipped; then the three steps from codes to W, and W's gradient."""
    return 3 * 4 + 1 + 4 * dtype.itemsize


def _groups(base: Weight) -> int:
    """G, the quantization blocks in a row."""
    base.intact()
    if isinstance(base, CodebookWeight):
        return base.absmax.shape[1]
    assert isinstance(base, AffineWeight)
    return base.scale.shape[1]


def _moved(base: AffineWeight, o_eff: Tensor, zero: Tensor | None) -> Range:
    scale = base.range().scale_NG
    return Range(scale, None, o_eff) if zero is None else Range(scale, zero, None)


def _masters(base: AffineWeight) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Trainable float32 copies of the stored scales and real offsets."""
    scale, _, offset = base.range()
    return nn.Parameter(scale.clone()), None if offset is None else nn.Parameter(offset.clone())


def _at_stored(base: AffineWeight, scale: nn.Parameter, offset: nn.Parameter | None) -> bool:
    """Whether trained scales and offsets act as those that are stored."""
    pairs = zip(_trained_range(base, scale, offset), base.range(), strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _trained_range(base: AffineWeight, scale: nn.Parameter, offset: nn.Parameter | None) -> Range:
    shape, device = base.intact().scale.shape, base.scale.device
    zero = None if base.zero is None else base.zero.float()
    s = base.stored_scale(intact.trained("scale", scale, shape, device))
    o = None if offset is None else base.stored_offset(intact.trained("offset", offset, shape, device))
    return Range(s, zero, o)


def from_spec(spec: dict[str, Any], base: Weight) -> Adapter:
    """An adapter laid out by its spec for `base`, with no data yet."""
    shape = spec.get("delta")
    delta = None if shape is None else PooledDelta(DeltaShape(**shape))
    if spec["place"] == "levels":
        assert isinstance(base, AffineWeight)
        return DeltaLevels(delta, base)
    if spec["place"] == "master":
        assert isinstance(base, AffineWeight)
        return MasterLevels(torch.empty(base.shape), base)
    assert delta is not None
    return DeltaOutput(delta) if spec["place"] == "output" else DeltaOffset(delta)


__all__ = ["Adapter", "DeltaLevels", "DeltaOffset", "DeltaOutput", "Fold", "FoldKind", "MasterLevels", "from_spec"]
