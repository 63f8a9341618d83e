"""One parametrisation of a weight update for the whole family:

    delta_W = scaling * Repeat_m( B A ) Pool_p        A: (R, K/p)   B: (N/m, R)   or one matrix M: (N/m, K/p)

Pool_p adds p adjacent inputs (or averages them), Repeat_m copies each output m times, so delta_W is constant on tiles of
m x p. For m = p = 2 and R = 1:

    B A = | a b |      delta_W = | a a b b |
          | c d |                | a a b b |
                                 | c c d d |
                                 | c c d d |

p = m = 1 is LoRA; p = m = k with R = k r is Q-BaRA (arXiv 2407.17029), k times LoRA's rank for the same r (N + K)
parameters; p = g gives the updates that are constant on a quantization block (QA-LoRA, QA-BLoRA, and with a single
matrix QA-HiRA). Scaling and an average's 1/p belong to the delta itself, so nothing downstream knows of them.

The factor on the output side (B, or M) starts at zero and A Kaiming-uniform(sqrt 5), so every method starts as its base.
A, B and M are trained in float32 and pass through bfloat16 (`adapter dtype`) wherever they are used, straight-through,
so that an engine's cast to bfloat16 changes nothing.

Legend: B (as a suffix) batch rows, N out features, K in features, R rank, G groups in a row.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.devices import double
from trimtab.errors import UserError
from trimtab.layers import intact
from trimtab.quant.grid import stored
from trimtab.quant.opaque import low_rank, plus_low_rank

AdapterDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class DeltaShape:
    """Everything about a delta but its values; saved with the model."""

    out_features: int
    in_features: int
    rank: int | None
    """Inner rank R; None for a single matrix M."""
    scaling: float
    pool: int = 1
    """p: adjacent inputs that are pooled."""
    repeat: int = 1
    """m: copies of each output."""
    mean: bool = False
    """Whether pooling averages (adds 1/p) instead of summing."""
    dtype: AdapterDtype = "bfloat16"
    """Dtype that the factors pass through."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank {self.rank} is not a positive number")
        for name, factor, features, side in (
            ("pool", self.pool, self.in_features, "input"),
            ("repeat", self.repeat, self.out_features, "output"),
        ):
            if factor < 1 or features % factor:
                divisors = [d for d in (1, 2, 4, 8, 16, 32, 64) if features % d == 0]
                raise UserError(
                    f"{name} {factor} does not divide the {features} {side} features; use one of {divisors}"
                )

    @property
    def gain(self) -> float:
        """scaling, times 1/p where the pool averages."""
        return self.scaling / self.pool if self.mean else self.scaling

    @property
    def parameters(self) -> int:
        """Trainable parameters: those of A and B, or of M."""
        rows, columns = self.out_features // self.repeat, self.in_features // self.pool
        return rows * columns if self.rank is None else self.rank * (rows + columns)


class PooledDelta(nn.Module):
    """A trainable update of the form above.

    Args:
        shape: sizes, scaling and dtype.
        device: where the factors live.
    """

    def __init__(self, shape: DeltaShape, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.shape = shape
        rows, columns = shape.out_features // shape.repeat, shape.in_features // shape.pool
        self.A: nn.Parameter | None = None
        self.B: nn.Parameter | None = None
        self.M: nn.Parameter | None = None
        if shape.rank is None:
            self.M = nn.Parameter(torch.zeros(rows, columns, device=device))
        else:
            self.A = nn.Parameter(torch.empty(shape.rank, columns, device=device))
            self.B = nn.Parameter(torch.zeros(rows, shape.rank, device=device))
            nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self._sizes = {name: p.shape for name, p in self.named_parameters()}

    def masters(self) -> tuple[Tensor, ...]:
        """(M,) or (A, B) as they are trained, float32."""
        given = list(self.named_parameters())
        device = given[0][1].device
        return tuple(intact.trained(name, p, self._sizes[name], device) for name, p in given)

    def factors(self) -> tuple[Tensor, ...]:
        """(M,) or (A, B) as they act: exact in the adapter dtype, float32, with straight-through gradients."""
        return tuple(stored(p, self.shape.dtype) for p in self.masters())

    def idle(self) -> bool:
        """Whether it is zero now."""
        return any(not p.any() for p in self.parameters())

    def forward(self, x_BK: Tensor) -> Tensor:
        """delta_W x without forming delta_W: (..., K) to (..., N) in x's dtype."""
        shape, dtype = self.shape, x_BK.dtype
        # What is cast to the adapter dtype acts as it is stored: of an operator, two casts and its graph one cast is left.
        # Not for a compiler, which makes a sum of a product of rank 1 and leaves its casts out.
        cast = getattr(torch, shape.dtype) == dtype and self.M is None and not torch.compiler.is_compiling()
        factors = self.masters() if cast else self.factors()
        pooled = _add_adjacent(x_BK, shape.pool)
        if len(factors) == 1:
            y = F.linear(pooled, (factors[0] * shape.gain).to(dtype))
        else:  # scaling the R numbers between the factors is the cheapest place for it
            y = F.linear(F.linear(pooled, factors[0].to(dtype)) * shape.gain, factors[1].to(dtype))
        # Copies by `stack`: twice as fast as repeat_interleave, and its gradient adds strided halves.
        return y if shape.repeat == 1 else torch.stack([y] * shape.repeat, -1).flatten(-2)

    def _inner(self) -> Tensor:
        """scaling * B A, or scaling * M: (N/m, K/p) in float32, also under autocast."""
        *a, b = self.factors()
        return low_rank(b, a[0] if a else None, self.shape.gain)

    def dense(self) -> Tensor:
        """delta_W, float32 of shape (N, K)."""
        return _tile(self._inner(), self.shape.repeat, self.shape.pool)

    def added_to(self, x_NK: Tensor) -> Tensor:
        """x + delta_W, in one pass where the delta is a plain low-rank product."""
        if self.plain:
            a, b = self.factors()
            return plus_low_rank(x_NK, b, a, self.shape.gain)
        return x_NK + self.dense()

    def per_group(self, group: int) -> Tensor:
        """The update of each quantization block, float32 of shape (N, K / group); needs p to be a multiple of group."""
        assert self.shape.pool % group == 0, (self.shape.pool, group)
        return _tile(self._inner(), self.shape.repeat, self.shape.pool // group)

    @torch.no_grad()
    def approach(self, update_NK: Tensor) -> None:
        """Start at the update of this form that is nearest to a given one (N, K) in Frobenius norm.

        That is its mean over each tile, and of these means the R leading singular values, shared out evenly to A and B.
        """
        shape = self.shape
        tiles = double(update_NK).unflatten(1, (-1, shape.pool)).mean(2).unflatten(0, (-1, shape.repeat)).mean(1)
        inner = tiles / shape.gain
        if self.M is not None:
            self.M.copy_(inner)
            return
        assert self.A is not None
        assert self.B is not None
        # The eigenvectors of the smaller Gram matrix, in float64: a tenth of the time of a singular value decomposition.
        wide = inner.shape[0] < inner.shape[1]
        tall = inner.T if wide else inner
        _, vectors = torch.linalg.eigh(tall.T @ tall)
        right = vectors[:, -self.A.shape[0] :].flip(1)
        left = tall @ right
        root = left.norm(dim=0).sqrt()
        left = torch.where(root > 0, left / root, torch.zeros_like(left))
        b, a = (right * root, left.T) if wide else (left, (right * root).T)
        self.A.zero_()[: a.shape[0]] = a.to(self.A.dtype)
        self.B.zero_()[:, : b.shape[1]] = b.to(self.B.dtype)

    @property
    def plain(self) -> bool:
        """Whether it is a plain low-rank product: its factors are those of `as_plain`."""
        return self.shape.repeat == self.shape.pool == 1 and self.A is not None

    def as_plain(self, *, acting: bool = True) -> tuple[Tensor, Tensor]:
        """The factors of the plain low-rank update that this one equals: A Pool (R, K) and Repeat B (N, R), unscaled.

        Without `acting` they are as trained, for a caller that passes them through the adapter dtype itself.
        """
        factors, shape = self.factors() if acting else self.masters(), self.shape
        if len(factors) == 1:
            a, b = torch.eye(shape.in_features // shape.pool, device=factors[0].device), factors[0]
        else:
            a, b = factors
        if shape.pool > 1:
            a = a.repeat_interleave(shape.pool, 1)
        return a, b if shape.repeat == 1 else b.repeat_interleave(shape.repeat, 0)

    def gradients_of_plain(
        self, plain: tuple[Tensor | None, ...], found: tuple[Tensor | None, ...]
    ) -> dict[int, Tensor | None]:
        """Gradients of what is trained here, by its `id`, from those of `as_plain`; all but copies is straight-through."""
        wanted = [p for p in self.parameters() if p.requires_grad]
        if self.plain:
            return {id(p): found[0] if p is self.A else found[1] for p in wanted}
        pairs = [(t, g) for t, g in zip(plain, found, strict=True) if t is not None and t.requires_grad]
        of = torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs])
        return dict(zip(map(id, wanted), of, strict=True))

    def as_lora(self) -> tuple[Tensor, Tensor]:
        """The ordinary LoRA that this delta equals: A' = A Pool (R, K) and B' = scaling * Repeat B (N, R).

        A single matrix M becomes A' = Pool (K/p, K), B' = scaling * Repeat M, of rank K/p.
        """
        a, b = self.as_plain()
        return a, b * self.shape.gain


def _add_adjacent(x_BK: Tensor, pool: int) -> Tensor:
    """Sums of `pool` adjacent inputs: (..., K) to (..., K / pool) in x's dtype."""
    if pool == 1:
        return x_BK
    tiles = x_BK.unflatten(-1, (-1, pool))
    if pool > 4:
        return tiles.sum(-1)
    # A reduction over so short a last axis runs element by element: strided adds take a fifth of its time for a pair.
    total, *others = tiles.unbind(-1)
    for other in others:
        total = total + other
    return total


def _tile(x: Tensor, rows: int, columns: int) -> Tensor:
    """Every entry of x spread over a tile of rows x columns."""
    if rows == columns == 1:
        return x
    n, k = x.shape
    # Of one row or one column `reshape` makes a view that has no memory of its own, which no kernel reads.
    return x.view(n, 1, k, 1).expand(n, rows, k, columns).reshape(n * rows, k * columns).contiguous()
