"""What the operators are given: the right result, or an error by name, in every backend. No pointer is taken unseen."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.kernels import arguments, cpu, dequantize, triton_channel, triton_gpu, triton_parts, triton_products
from trimtab.kernels.arguments import OPERATORS
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.layers.weights import AffineWeight, CodebookWeight, DenseWeight, Weight
from trimtab.quant.grid import CodebookGrid, Grid

N, K, R, T = 6, 64, 3, 5
ROOM = Path(arguments.__file__).parent


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(name: str) -> tuple[Any, ...]:
    """Arguments that every backend of the operator takes."""
    affine = AffineWeight.quantize(random(N, K), Grid(4, 32, "integer"))
    table = CodebookWeight.quantize(random(N, K), CodebookGrid("nf4", 32, double_quant=True))
    fixed = AffineWeight.quantize(random(N, K), Grid(3, 32, "real"), "fixed8")
    levels = fixed.described(fixed.range(), (random(R, K), random(N, R)), 0.3)
    out, sums, ids = torch.empty(N, K), torch.empty(N, 2), torch.tensor([0, N - 1, 2])
    about = (*affine.range(), 4, 8.0)
    low = random(T, N).bfloat16(), random(T, K).bfloat16()
    return {
        "affine": (torch.empty(3, K), affine.codes.data, ids, *about),
        "codebook": (torch.empty(3, K), table.codes.data, ids, *table._about(None)),
        "affine_product": (torch.empty(T, N), random(T, K), affine.codes.data, *about),
        "codebook_product": (torch.empty(T, N), random(T, K), table.codes.data, *table._about(None)),
        "levels": (out, *levels),
        "level_gradients": (random(N, K).bfloat16(), sums, sums.clone(), *levels),
        "level_weights_clipped": (out.bfloat16(), torch.empty(N, 1, dtype=torch.int64), *levels),
        "take_out": (
            random(R, K),
            random(N, R),
            torch.zeros(N, 1, dtype=torch.int64),
            *low,
            random(R, K),
            random(N, R),
            random(N, 1),
        ),
        "column_products": (low[0], low[0]),
        "entries_of_product": (*low, ids, torch.tensor([0, K - 1, 5])),
        "extremes": (random(N, K), sums, sums.clone()),
        "range_errors": (sums, random(N, K), *affine.range(), 8.0, 4, 2.0),
        "encode": (random(N, K), torch.empty(N, K // 2, dtype=torch.uint8), *affine.range(), 8.0, 4, False),
        "encode_table": (random(N, K), torch.empty(N, K // 2, dtype=torch.uint8), sums, random(15).sort().values, 4),
    }[name]


def backends(name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    if hasattr(cpu, name):
        yield "c", getattr(cpu, name)
    if hasattr(dequantize, f"_{name}"):
        yield "torch", getattr(dequantize, f"_{name}")
        yield "dispatched", getattr(dequantize, name)
    if triton_parts.available():
        modules = triton_gpu, triton_products, triton_channel
        yield from (("triton", vars(module)[name]) for module in modules if name in module.__all__)


def wrong(name: str, given: Tensor, role: str, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Tensor]]:
    """The tensor in every form that it must not have."""
    kinds = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64)
    yield from ((str(dtype), given.to(dtype)) for dtype in kinds if dtype not in dtypes)
    yield "on meta", given.to("meta")
    yield "with one dimension more", given.unsqueeze(0)
    for dim in range(given.dim()):
        if given.shape[dim] > 1:
            yield f"cut along {dim}", given.narrow(dim, 0, given.shape[dim] - 1).contiguous()
        yield f"empty along {dim}", given.narrow(dim, 0, 0).contiguous()
    if role != "read" and given.dim() == 2 and given.shape[1] > 1:
        yield "strided", given.repeat_interleave(2, 1)[:, ::2]


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_unsuitable_gets_through(name: str) -> None:
    """Every tensor of every operator, of a wrong dtype, size, layout or device, alone and in every backend."""
    for backend, function in backends(name):
        good = sample(name)
        if backend != "triton":
            function(*good)
        for i, stated in OPERATORS[name].arguments:
            if good[i] is None:
                continue
            dtypes = stated.reads["torch" if backend == "dispatched" else backend]  # type: ignore[index]
            for what, tensor in wrong(name, good[i], stated.role, dtypes):
                given = [t.clone() if isinstance(t, Tensor) else t for t in good]
                given[i] = tensor
                if (stated.name == "middles" and "along" in what) or (
                    stated.name == "absmax" and what == "cut along 1"
                ):
                    continue  # fewer boundaries are boundaries, and absmax alone says how many groups there are
                with pytest.raises(UserError, match=f"^{name}: |^row "):
                    pytest.fail(f"{backend} {stated.name} {what} got through: {function(*given)}")
            if not stated.optional:
                with pytest.raises((UserError, RuntimeError), match=stated.name):  # the dispatcher's own, for some
                    function(*good[:i], None, *good[i + 1 :])


def test_an_error_names_what_is_there_what_should_be_and_the_remedy() -> None:
    out, codes, *rest = sample("affine")
    with pytest.raises(
        UserError, match=r"^affine: codes is bfloat16 \(6, 32\) on cpu and should be contiguous uint8 "
    ) as e:
        dequantize.affine(out, codes.bfloat16(), *rest)
    assert "(V, W) on cpu; a layer's tensors were changed past `Module._apply`" in str(e.value)
    assert "exclude trimtab's layers from casts" in str(e.value)


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_read_may_be_strided(name: str) -> None:
    """Ids, inputs and scales that are slices or transposed: the numbers that contiguous ones give."""
    good = sample(name)
    loose = {i for i, stated in OPERATORS[name].arguments if stated.role == "read" and good[i] is not None}
    given = [t.repeat_interleave(2, -1)[..., ::2] if i in loose else t for i, t in enumerate(good)]
    for _, function in [b for b in backends(name) if b[0] != "triton"]:
        first, again = (
            [t.clone() if isinstance(t, Tensor) and t.is_contiguous() else t for t in a] for a in (good, given)
        )
        made, other = function(*first), function(*again)
        for x, y in zip((made, *first), (other, *again), strict=True):
            assert not isinstance(x, Tensor) or torch.equal(x, y)


def test_numbers_and_pairs_that_do_not_go_together() -> None:
    out, codes, _, *about = sample("affine")
    for bits in (0, 9, -1):
        with pytest.raises(UserError, match=f"affine: {bits} bits are not"):
            dequantize.affine(out, codes, None, *about[:3], bits, 8.0)
    with pytest.raises(UserError, match="out has 3 rows and the weight 6"):
        dequantize.affine(out, codes, None, *about)
    out, codes, _, table, absmax, *doubled, _, bits = sample("codebook")
    for pieces in ((None, *doubled[1:]), (None, None, None), (*doubled[:2], None)):
        with pytest.raises(UserError, match=r"codebook: absmax is uint8 \(6, 2\)"):
            dequantize.codebook(out, codes, torch.tensor([0, 1, 2]), table, absmax, *pieces, None, bits)
    out, phi, bits, fixed, a, b, *rest = sample("levels")
    for pair in ((a, None), (None, b)):
        with pytest.raises(UserError, match="levels: of the factors a and b one is missing"):
            dequantize.levels(out, phi, bits, fixed, *pair, *rest)


def test_what_may_be_left_out() -> None:
    optional = {a.name for operator in OPERATORS.values() for _, a in operator.arguments if a.optional}
    assert optional == {"rows", "zero", "offset", "dynamic_map", "block_scale", "mean", "a", "b", "of_offset"}


@pytest.mark.parametrize("bits", [5, 6])
def test_a_table_has_at_most_five_bits(bits: int) -> None:
    """C keeps the 32 values of a group in registers or on the stack."""
    width = {5: K // 2 + K // 8, 6: K // 2 + K // 4}[bits]
    codes = torch.zeros(N, width, dtype=torch.uint8)
    given = (codes, None, torch.full((2**bits,), 3.0), torch.full((N, 2), 2.0), None, None, None, None, bits)
    for out in (torch.empty(N, K), torch.empty(N, K, dtype=torch.bfloat16)):
        if bits == 5:
            dequantize.codebook(out, *given)
            assert (out == 6).all()
        else:
            with pytest.raises(UserError, match="codebook: a table has at most 5 bits, not 6"):
                dequantize.codebook(out, *given)


@pytest.mark.parametrize("bits", [6, 8])
def test_nor_is_a_wider_one_encoded(bits: int) -> None:
    out, absmax = torch.empty(N, bits * K // 8, dtype=torch.uint8), torch.empty(N, 2)
    with pytest.raises(UserError, match=f"encode_table: a table has at most 5 bits, not {bits}"):
        cpu.encode_table(random(N, K), out, absmax, random(15).sort().values, bits)


def test_boundaries_part_no_more_entries_than_there_are_codes() -> None:
    weight, out, absmax, _, bits = sample("encode_table")
    cpu.encode_table(weight, out, absmax, random(15).sort().values, bits)
    with pytest.raises(UserError, match="encode_table: 16 boundaries part more entries than 4 bits can name"):
        cpu.encode_table(weight, out, absmax, random(16).sort().values, bits)


def weights() -> dict[str, Weight]:
    w = random(8, K)
    affine = {s: AffineWeight.quantize(w, Grid(4, 32), s) for s in ("int", "fixed8", "bf16", "fp32")}  # type: ignore[arg-type]
    return {"dense": DenseWeight(w), "nf4": CodebookWeight.quantize(w, CodebookGrid("nf4", 32)), **affine}


@pytest.mark.parametrize("torch_only", [False, True])
@pytest.mark.parametrize("kind", weights())
def test_ids(kind: str, torch_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided ids, once an assertion; none at all; narrow ones; ids outside the vocabulary, -1 among them, by name."""
    if torch_only:
        monkeypatch.setattr(cpu, "library", lambda: None)
    layer = QuantEmbedding(weights()[kind], torch.float32)
    rows, ids = layer.base.dequantize(torch.float32), torch.tensor([[1, 2], [7, 0]])
    with torch.no_grad():
        assert torch.equal(layer(ids[:, :1]), rows[ids[:, :1]])
        assert torch.equal(layer(ids.t()), rows[ids.t()])
        assert torch.equal(layer(ids.int()), rows[ids])
        assert torch.equal(layer(torch.tensor([3]).expand(2, 4)), rows[torch.full((2, 4), 3)])
        for shape in ((0,), (0, 3), (2, 0)):
            assert layer(torch.empty(shape, dtype=torch.int64)).shape == (*shape, K)
        for bad in (-1, 8, 1 << 40):
            with pytest.raises(IndexError, match=f"row {bad} of a weight that has 8 rows") as e:
                layer(torch.tensor([[0, bad]]))
            assert isinstance(e.value, UserError)
        for dtype in (torch.uint8, torch.bool, torch.float32):
            with pytest.raises(UserError, match="rows"):
                layer(ids.to(dtype))


def test_on_a_gpu_ids_are_asserted_there() -> None:
    """Without waiting for their values, by torch's own assertion, which the CPU has, too."""
    arguments._within_on_device(torch.tensor([0, 7]), 8)
    for bad in (-1, 8):
        with pytest.raises(RuntimeError, match="a row outside 0 to 7 of a stored weight: a token id beyond"):
            arguments._within_on_device(torch.tensor([0, bad]), 8)


@pytest.mark.parametrize("batch", [(0,), (0, 4), (2, 0), (1,), (1, 1), (3, 1)])
@pytest.mark.parametrize("shape", [(1, 32), (1, 1), (9, 1), (5, 7)])
def test_small_and_empty_batches_and_layers(batch: tuple[int, ...], shape: tuple[int, int]) -> None:
    for kind in (Grid(3, None, "integer"), CodebookGrid("nf4", None, double_quant=True)):
        weight = (AffineWeight if isinstance(kind, Grid) else CodebookWeight).quantize(random(*shape), kind)  # type: ignore[arg-type]
        layer, x = QuantLinear(weight), random(*batch, shape[1], seed=1)
        expected = x @ layer.dequantize(torch.float32).t()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected)
            strided = x.repeat_interleave(2, -1)[..., ::2]
            torch.testing.assert_close(layer(strided), expected)
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == x.shape


def test_a_tensor_without_data_is_not_read() -> None:
    """Fake, or freed by an engine that shards: a pointer to nothing."""
    freed = torch.empty(4, 4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(UserError, match="has no data here"):
        arguments.address(freed)
    with pytest.raises(UserError, match="has no data here"):
        arguments.address(torch.empty(2, device="meta"))
    assert arguments.address(torch.empty(0)) == 0
    assert arguments.address(None) is None


def test_what_was_checked_is_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor checked again: a model calls with few combinations."""
    monkeypatch.setattr(arguments, "_REMEMBERED", 3)
    operator, checks = OPERATORS["extremes"], []
    monkeypatch.setattr(operator, "_seen", {})
    real = operator._check
    monkeypatch.setattr(operator, "_check", lambda *given: (checks.append(given), real(*given))[1])
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        for _ in range(2):
            w, low, high = random(rows, 4), torch.empty(rows, 2), torch.empty(rows, 2)
            cpu.extremes(w, low, high)
            assert torch.equal(high, w.unflatten(1, (2, 2)).amax(-1))
        assert len(operator._seen) <= 4
    assert len(checks) == 9


def test_compiled_calls_are_checked_too() -> None:
    """With tensors that have no data the operators check what can be known: all but the values of ids."""
    out, codes, *rest = sample("affine")
    with (
        torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(UserError, match="codes is"),
    ):
        dequantize.affine(torch.empty(3, K), codes.bfloat16(), *rest)
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in (out, codes, *rest)]
    dequantize.affine(*meta)
    with pytest.raises(UserError, match=r"affine: scale is .* on cpu and should be"):
        dequantize.affine(*meta[:3], rest[1], *meta[4:])


# ---- no pointer is taken unseen ----------------------------------------------------------------------------------


def pointers(source: str) -> list[int]:
    """Lines that ask a tensor where it lies."""
    names = {"data_ptr", "_data_ptr", "from_address", "numpy"}
    return [n.lineno for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute) and n.attr in names]


def unchecked(source: str) -> list[str]:
    """Public functions of a backend that are not wrapped in the operator's statement."""
    known = {"library", "serves", "available"}
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in known
        if not any(ast.unparse(d).startswith("checked(") for d in node.decorator_list)
    ]


def test_one_place_takes_pointers_and_every_backend_is_checked() -> None:
    found = {path.name: pointers(path.read_text()) for path in ROOM.rglob("*.py")}
    assert [name for name, lines in found.items() if lines] == ["arguments.py"]
    assert len(found["arguments.py"]) == 1
    others = [p for p in ROOM.parent.rglob("*.py") if "data_ptr" in p.read_text() and p.parent != ROOM]
    assert others == []
    for module in ("cpu.py", "triton_gpu.py", "triton_products.py", "triton_channel.py"):
        assert unchecked((ROOM / module).read_text()) == []
    assert unchecked("@checked('c')\ndef a(): ...\ndef b(): ...\ndef _c(): ...") == ["b"]
    assert pointers("def f(t):\n    return t.data_ptr()") == [2]
    for name in dequantize._OPERATORS:
        assert all(hasattr(f, "__wrapped__") for _, f in backends(name) if not isinstance(f, torch._ops.OpOverload))
