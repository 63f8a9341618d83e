"""The operators that a compiler calls and does not look into: schemas, and forms without data, by torch's own checker."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.kernels import levels
from trimtab.quant import activations, opaque, two_level


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


N, K, G, R = 3, 8, 2, 5
T = random(K, N, seed=1).t()  # laid out by columns
X, A, B, SCALE, ZERO, ONE = random(N, K), random(R, K), random(N, R), random(N, G), torch.ones(N, G), torch.ones(N, 1)
INTEGERS = (10 * X).to(torch.int8)
DOUBLES = tuple(t.double() for t in (X, SCALE, ZERO))
CASES: dict[str, tuple[Any, list[tuple[Any, ...]]]] = {
    "stored": (opaque._trained, [(X, "portable"), (T, "float16"), (T, "portable"), (DOUBLES[0], "bfloat16")]),
    "stored_frozen": (opaque._frozen, [(X, "portable"), (T, "bfloat16")]),
    "low_rank": (opaque._low_rank_operator, [(B, A, 0.5), (B, None, 0.5), (T, None, 0.5), (B.double(), A.double(), 2.0)]),
    "plus_low_rank": (opaque._plus_low_rank_operator, [(X, B, A, 0.5), (T, B, A, 0.5)]),
    "levels_of": (
        opaque._levels_operator,
        [
            (X, SCALE, None, None, 8.0), (T, SCALE, ZERO, None, 8.0), (DOUBLES[0], SCALE, ZERO, None, 8.0),
            (X, DOUBLES[1], None, DOUBLES[2], 8.0), (T, ONE, None, None, 8.0),
        ],
    ),
    "moved_zeros": (opaque._zeros_operator, [(ZERO, SCALE, SCALE, 15), (T, T, T, 15)]),
    "stored_two_level": (
        two_level._operator,
        [(X, INTEGERS, 1, 15, 4), (X, INTEGERS, 0, 15, 2), (T, INTEGERS, -32, 31, 4), (DOUBLES[0], INTEGERS, 1, 63, 8)],
    ),
    "from_levels": (
        levels._operator,
        [
            (X, SCALE, None, None, 4, "float32", torch.float32),
            (X, SCALE, ZERO, None, 4, "float32", torch.bfloat16),
            (T, SCALE, None, ZERO, 4, "float32", torch.float32),
            (T, ONE, None, None, 4, "float32", torch.float32),
            (*DOUBLES[:2], None, DOUBLES[2], 4, "float32", torch.float64),
        ],
    ),
    "token_range": (
        activations._token_range_operator,
        [(X, 8, False), (X, 4, True), (random(2, 3, 4, K).bfloat16(), 8, False), (T, 8, False), (DOUBLES[0], 8, False)],
    ),
    "round_to_grid": (
        activations._round_operator,
        [
            (X, ONE, None, 8, False), (X.bfloat16(), ONE, ONE, 4, True), (T, ONE, None, 8, True),
            (random(2, 3, K), torch.ones(1), torch.ones(1), 4, True),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operators_keep_the_rules_of_torch(name: str) -> None:
    """Shapes, dtypes and strides of a result are those that are promised for tensors without data."""
    operator, every = CASES[name]
    assert operator is getattr(torch.ops.trimtab, name).default
    for arguments in every:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        meta = operator(*(t.to("meta") if isinstance(t, Tensor) else t for t in arguments))
        made = operator(*arguments)
        pairs = zip(made, meta, strict=True) if isinstance(made, tuple) else [(made, meta)]
        for real, without in pairs:
            assert without.is_meta
            assert (without.shape, without.dtype) == (real.shape, real.dtype)
            assert without.is_contiguous() == real.is_contiguous()
