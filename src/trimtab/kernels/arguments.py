"""What each operator is given, stated once, and checked in every backend before anything is computed or read.

C and Triton take bare pointers: a tensor of another dtype, shape or layout than they were written for is read as garbage or
beyond its end. So an operator is one entry of `OPERATORS`: its tensors in their order, each with the dtypes that it may
have and its shape in symbols that hold across all of them. `checked` wraps the function of each backend (C, Triton, the
torch reference, the one for tensors without data) in that statement, and `address` is the only place that asks a tensor
for its pointer.

    stored      what a file holds: codes and their kin. Must be as it was stored, contiguous too.
    read        what is computed or comes from others (ids, inputs, scales on their way): made contiguous where it is not
    written     what the operator fills: must be contiguous, or the result would be lost

Sizes that follow from others: W bytes in a packed row, E entries of a table, D blocks of double quantization, L words with
a bit for each column.

The road not taken: checks in the schema of `torch.library`, which knows neither dtypes nor shapes.

Legend: N out features, V stored rows, M rows made, K in features, G groups in a row, R rank, T tokens, P entries.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import UserError
from trimtab.quant.codebook import DOUBLE_BLOCK
from trimtab.quant.packing import row_bytes

Backend = Literal["c", "triton", "torch", "no data"]
Dtypes = tuple[torch.dtype, ...]
Admitted = tuple[list[int], list[tuple[int, int]]]

_HALF, _SINGLE, _BYTES, _LONG = (torch.bfloat16,), (torch.float32,), (torch.uint8,), (torch.int64,)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_C_FLOATS, _GPU_FLOATS = (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16, torch.float32)

CAST = (
    "a layer's tensors were changed past `Module._apply` (by mixed precision of FSDP2 or DeepSpeed, say, or by "
    "`p.data = p.data.bfloat16()`): exclude trimtab's layers from casts and moves of parameters, or load the model again"
)
_REMEMBERED = 4096
"""Combinations of dtypes and shapes that an operator has checked and need not check again."""
_GIVEN = "convert what you pass"
_TABLE_BITS = 5
"""C keeps the values of a group in registers or on the stack, and packs codes of whole bytes nowhere."""


class RowError(UserError, IndexError):
    """A row, mostly a token id, that a stored weight does not have."""


class Argument:
    """One tensor of an operator.

    Args:
        name: as in the operator's schema.
        dtypes: those that it may have.
        shape: symbols, one for each dimension.
        role: stored, read or written (see above).
        c: the dtypes that the C kernel reads, if not all.
        triton: the dtypes that the Triton kernel reads, if not all.
        optional: whether None may be given.
    """

    def __init__(
        self, name: str, dtypes: Dtypes, shape: str, role: Literal["stored", "read", "written"] = "read", *,
        c: Dtypes | None = None, triton: Dtypes | None = None, optional: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.dtypes, self.shape, self.role, self.optional = (
            name,
            dtypes,
            tuple(shape.split()),
            role,
            optional,
        )
        self.reads: dict[Backend, Dtypes] = {
            "c": c or dtypes, "triton": triton or dtypes, "torch": dtypes, "no data": dtypes,
        }  # fmt: skip


class Operator:
    """The statement of one operator.

    Args:
        name: what errors call it.
        arguments: its tensors, in order; numbers that follow or stand between them are named in `numbers`.
        numbers: position of each number that a size or a rule needs.
        indices: position of each tensor of indices, and the symbol of the size that they go into.
        rule: what no single tensor can say: given all arguments and sizes, a complaint or None.
    """

    def __init__(
        self, name: str, *arguments: Argument | None, numbers: dict[str, int] | None = None,
        indices: dict[int, str] | None = None,
        rule: Callable[[tuple[Any, ...], dict[str, int]], str | None] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.numbers, self.indices, self.rule = name, numbers or {}, indices or {}, rule
        self.arguments = [(i, a) for i, a in enumerate(arguments) if a is not None]
        self._seen: dict[tuple[Any, ...], Admitted] = {}

    def fits(self, backend: Backend, arguments: tuple[Any, ...]) -> bool:
        """Whether the backend's kernel reads these dtypes; where it does not, the torch reference serves."""
        return all(arguments[i] is None or arguments[i].dtype in a.reads[backend] for i, a in self.arguments)

    def admit(self, arguments: tuple[Any, ...], backend: Backend) -> tuple[Any, ...]:
        """The arguments as the backend may have them, or a `UserError` that names the tensor and the remedy."""
        if backend == "no data":  # sizes may be symbols, which cannot be looked up, and indices have no values
            self._check(arguments, backend)
            return arguments
        # A model calls with few combinations of dtypes and shapes: each is checked once. (`docs/log.md` has the times.)
        seen = (backend, *[arguments[i] for i in self.numbers.values()])
        seen += tuple(
            None if t is None else (t.dtype, t.shape, t.device, t.is_contiguous())
            for t in [arguments[i] for i, _ in self.arguments]
        )
        if seen not in self._seen:
            if len(self._seen) > _REMEMBERED:
                self._seen.clear()
            self._seen[seen] = self._check(arguments, backend)
        strided, bounds = self._seen[seen]
        for i, size in bounds:
            within(arguments[i], size)
        return tuple(t.contiguous() if i in strided else t for i, t in enumerate(arguments)) if strided else arguments

    def _check(self, arguments: tuple[Any, ...], backend: Backend) -> "Admitted":
        """What is still to be done: which arguments are to be made contiguous, and which hold indices, below what."""
        strided, sizes, device = [], {n: arguments[i] for n, i in self.numbers.items()}, None
        if "bits" in sizes and not 1 <= sizes["bits"] <= 8:
            raise UserError(f"{self.name}: {sizes['bits']} bits are not between 1 and 8")
        for i, stated in self.arguments:
            given = arguments[i]
            if given is None:
                if not stated.optional:
                    self._refuse(stated, given, sizes, device, backend)
                continue
            device = device or given.device
            if given.dtype not in stated.reads[backend] or given.device != device or len(stated.shape) != given.dim():
                self._refuse(stated, given, sizes, device, backend)
            for symbol, size in zip(stated.shape, given.shape, strict=True):
                if symbol not in sizes:
                    sizes[symbol] = _FOLLOWS[symbol](sizes) if symbol in _FOLLOWS else size
                if sizes[symbol] != size:
                    self._refuse(stated, given, sizes, device, backend)
            if not given.is_contiguous():
                if stated.role != "read":
                    self._refuse(stated, given, sizes, device, backend)
                strided.append(i)
        if "G" in sizes and (sizes["K"] < 1 or sizes["G"] < 1 or sizes["K"] % sizes["G"]):
            raise UserError(f"{self.name}: {sizes['K']} columns cannot be cut into {sizes['G']} groups of equal size")
        complaint = self.rule and self.rule(arguments, sizes)
        if complaint:
            raise UserError(f"{self.name}: {complaint}")
        return strided, [(i, sizes[symbol]) for i, symbol in self.indices.items() if arguments[i] is not None]

    def _refuse(
        self, stated: Argument, given: Tensor | None, sizes: dict[str, int], device: Any, backend: Backend
    ) -> NoReturn:
        shape = ", ".join(s if s not in sizes else f"{s} = {sizes[s]}" for s in stated.shape)
        dtypes = " or ".join(str(d).removeprefix("torch.") for d in stated.reads[backend])
        wanted = f"contiguous {dtypes} ({shape}){'' if device is None else f' on {device}'}"
        remedy = CAST if stated.role == "stored" else _GIVEN
        raise UserError(f"{self.name}: {stated.name} is {described(given)} and should be {wanted}; {remedy}")


def described(tensor: Tensor | None) -> str:
    """For example `bfloat16 (48, 32) on cpu`, with strides where they are unusual."""
    if tensor is None:
        return "None"
    strides = "" if tensor.is_contiguous() else f" with strides {tuple(tensor.stride())}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}{strides} on {tensor.device}"


_FOLLOWS: dict[str, Callable[[dict[str, int]], int]] = {
    "W": lambda s: s["K"] if s.get("fixed") else row_bytes(s["bits"], s["K"]),
    "E": lambda s: 2 ** s["bits"],
    "D": lambda s: -(-s["V"] * s["G"] // DOUBLE_BLOCK),
    "L": lambda s: -(-s["K"] // 64),
    "256": lambda s: 256,
    "1": lambda s: 1,
}


# ---- rules that take more than one tensor -----------------------------------------------------------------------


def _all_or_none(*given: Tensor | None) -> bool:
    return len({t is None for t in given}) == 1


def _rows_made(arguments: tuple[Any, ...], sizes: dict[str, int]) -> str | None:
    if arguments[2] is not None or sizes["M"] == sizes["V"]:
        return None
    return f"out has {sizes['M']} rows and the weight {sizes['V']}, and no rows are named"


def _wide_table(bits: int) -> str:
    return f"a table has at most {_TABLE_BITS} bits, not {bits}"


def _table(arguments: tuple[Any, ...], sizes: dict[str, int]) -> str | None:
    absmax, *doubled = arguments[-6:-2]
    if sizes["bits"] > _TABLE_BITS:
        return _wide_table(sizes["bits"])
    if _all_or_none(*doubled) and (absmax.dtype == torch.uint8) == (doubled[0] is not None):
        return None
    return f"absmax is {described(absmax)}: uint8 takes dynamic_map, block_scale and mean, float32 none of them; {CAST}"


def _codebook(arguments: tuple[Any, ...], sizes: dict[str, int]) -> str | None:
    return _rows_made(arguments, sizes) or _table(arguments, sizes)


def _factors(arguments: tuple[Any, ...], sizes: dict[str, int]) -> str | None:
    a, b = arguments[-8:-6]
    return None if _all_or_none(a, b) else "of the factors a and b one is missing"


def _middles(arguments: tuple[Any, ...], sizes: dict[str, int]) -> str | None:
    m, bits = sizes["m"], sizes["bits"]
    if bits > _TABLE_BITS:
        return _wide_table(bits)
    return None if m < 2**bits else f"{m} boundaries part more entries than {bits} bits can name"


def within(indices: Tensor, size: int) -> None:
    """A `RowError` that names the first of the indices that is outside 0 .. size - 1.

    On a GPU, whose numbers are not waited for, it is torch's own assertion on the device that fails.
    """
    if not indices.numel() or indices.is_meta:
        return
    if indices.is_cuda:
        _within_on_device(indices, size)
        return
    least, most = (int(t) for t in torch.aminmax(indices))
    if least < 0 or most >= size:
        raise RowError(
            f"row {least if least < 0 else most} of a weight that has {size} rows, 0 to {size - 1}: where rows are token "
            "ids, this one is outside the vocabulary; check that tokenizer and model belong together"
        )


def _within_on_device(indices: Tensor, size: int) -> None:
    inside = ((indices >= 0) & (indices < size)).all()
    torch._assert_async(inside, f"a row outside 0 to {size - 1} of a stored weight: a token id beyond the vocabulary?")


def rows_of(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """The rows that are asked for, by name if one is not there; the tensor itself where none are."""
    if rows is None:
        return tensor
    if rows.dtype not in (torch.int64, torch.int32):
        raise UserError(f"rows are asked for by {described(rows)}; give int64 or int32 ids")
    try:  # unlike `tensor[rows]`, it takes no row from the end for an id of -1
        return F.embedding(rows, tensor)
    except IndexError:
        within(rows, len(tensor))
        raise


# ---- in use -----------------------------------------------------------------------------------------------------


def checked(backend: Backend, name: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for what a backend does for the operator of that name (by default its own, without underscores)."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        operator = OPERATORS[name or function.__name__.lstrip("_")]

        @wraps(function)
        def run(*arguments: Any) -> Any:
            return function(*operator.admit(arguments, backend))

        return run

    return decorate


def address(tensor: Tensor | None) -> int | None:
    """Where the data of an argument lie, which `checked` has seen: the one place that takes a pointer."""
    if tensor is None:
        return None
    pointer = 0 if tensor.device.type != "cpu" else tensor.data_ptr()
    if not pointer and tensor.numel():
        raise UserError(f"{described(tensor)} has no data here: it is fake, or an engine keeps its memory elsewhere")
    return pointer


# ---- the operators ----------------------------------------------------------------------------------------------


def _out(name: str, shape: str, dtypes: Dtypes = _FLOATS, extra: Dtypes = (), c: Dtypes = _C_FLOATS) -> Argument:
    return Argument(name, dtypes + extra, shape, "written", c=c + extra, triton=_GPU_FLOATS + extra)


_CODES = Argument("codes", _BYTES, "V W", "stored")
_ROWS = _out("out", "M K"), _CODES, Argument("rows", (torch.int64, torch.int32), "M", optional=True)
_AFFINE = (
    Argument("scale", _GPU_FLOATS, "V G", c=_C_FLOATS),
    Argument("zero", _GPU_FLOATS + _BYTES, "V G", c=_C_FLOATS + _BYTES, optional=True),
    Argument("offset", _GPU_FLOATS, "V G", c=_C_FLOATS, optional=True),
)
_CODEBOOK = (
    Argument("table", _SINGLE, "E"),
    Argument("absmax", _SINGLE + _BYTES, "V G", "stored"),
    Argument("dynamic_map", _SINGLE, "256", optional=True),
    Argument("block_scale", _SINGLE, "D", "stored", optional=True),
    Argument("mean", _SINGLE, "1", "stored", optional=True),
    Argument("offset", _SINGLE, "V G", optional=True),
)
_LEVELS = (
    Argument("phi", _BYTES, "N W", "stored"),
    None,  # bits
    None,  # fixed
    Argument("a", _SINGLE, "R K", optional=True),
    Argument("b", _SINGLE, "N R", optional=True),
    None,  # gain
    Argument("scale", _SINGLE, "N G"),
    Argument("zero", _SINGLE, "N G", optional=True),
    Argument("offset", _SINGLE, "N G", optional=True),
)
_RANGE = (
    Argument("scale", _SINGLE, "N G"),
    Argument("zero", _SINGLE, "N G", optional=True),
    Argument("offset", _SINGLE, "N G", optional=True),
)
_X, _Y = Argument("x", _GPU_FLOATS, "T K", c=_C_FLOATS), _out("y", "T V", _GPU_FLOATS, c=_SINGLE)
_WEIGHT = Argument("weight", _C_FLOATS, "N K")


def _levels_operator(name: str, *first: Argument) -> Operator:
    return Operator(
        name, *first, *_LEVELS, numbers={"bits": len(first) + 1, "fixed": len(first) + 2}, rule=_factors
    )  # fmt: skip


_STATED = (
    Operator("affine", *_ROWS, *_AFFINE, numbers={"bits": 6}, indices={2: "V"}, rule=_rows_made),
    Operator("codebook", *_ROWS, *_CODEBOOK, numbers={"bits": 9}, indices={2: "V"}, rule=_codebook),
    Operator("affine_product", _Y, _X, _CODES, *_AFFINE, numbers={"bits": 6}),
    Operator("codebook_product", _Y, _X, _CODES, *_CODEBOOK, numbers={"bits": 9}, rule=_table),
    _levels_operator("levels", _out("out", "N K", extra=_BYTES)),
    _levels_operator(
        "level_gradients", _out("grad", "N K", c=_HALF), Argument("of_scale", _SINGLE, "N G", "written"),
        Argument("of_offset", _SINGLE, "N G", "written", optional=True),
    ),
    _levels_operator(
        "level_weights_clipped", Argument("out", _HALF, "N K", "written"), Argument("clipped", _LONG, "N L", "written")
    ),
    Operator(
        "take_out", Argument("of_a", _SINGLE, "R K", "written"), Argument("of_b", _SINGLE, "N R", "written"),
        Argument("clipped", _LONG, "N L"), Argument("g", _HALF, "T N"), Argument("x", _HALF, "T K"),
        Argument("a", _SINGLE, "R K"), Argument("b", _SINGLE, "N R"), Argument("scale", _SINGLE, "N 1"),
    ),
    Operator("column_products", Argument("a", _HALF, "T N"), Argument("b", _HALF, "T N")),
    Operator(
        "entries_of_product", Argument("g", _HALF, "T N"), Argument("x", _HALF, "T K"), Argument("n", _LONG, "P"),
        Argument("k", _LONG, "P"), indices={2: "N", 3: "K"},
    ),
    Operator(
        "extremes", _WEIGHT, Argument("low", _SINGLE, "N G", "written"), Argument("high", _SINGLE, "N G", "written")
    ),
    Operator(
        "range_errors", Argument("out", _SINGLE, "N G", "written"), Argument("weight", _SINGLE, "N K"), *_RANGE,
        numbers={"bits": 6},
    ),
    Operator(
        "encode", _WEIGHT, Argument("out", _BYTES, "N W", "written"), *_RANGE, numbers={"bits": 6, "fixed": 7}
    ),
    Operator(
        "encode_table", _WEIGHT, Argument("out", _BYTES, "N W", "written"), Argument("absmax", _SINGLE, "N G", "written"),
        Argument("middles", _SINGLE, "m"), numbers={"bits": 4}, rule=_middles,
    ),
)  # fmt: skip
OPERATORS = {operator.name: operator for operator in _STATED}
"""Every operator by its name."""
