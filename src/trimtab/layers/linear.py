"""The two modules that are put into a model: a stored weight, an adapter or none, a bias or none.

    QuantLinear      y = x_hat W^T + bias (+ adapter output of x),  W rebuilt whenever it is needed
    QuantEmbedding   rows of the same weight kinds

There is no subclass per method and none per format: a method chooses the weight kind and the adapter kind, and these
modules never change when either list grows. A tied head is a `QuantLinear` that borrows the embedding's weight.

x_hat is x, or x rounded to a grid by a plug of its own (`activations`). An output adapter reads x itself: an engine that
serves a LoRA beside a low-bit layer gives it what the layer was given. All that folds into W (levels, offsets, a master)
reads x_hat, as W does.

There is deliberately no `.weight`: a computed one lets other libraries "merge" into a temporary and drop the adapter
silently. Asking for it raises, with advice, and so does setting it. Only a head has one, computed on request: losses
that never make all logits at once multiply by it themselves (TRL's, Liger's). It is the matrix with its adapter, with
gradients for what is trained, and it can be read but not written to (`head_matrix`). Stored dtypes survive `.to(dtype)`: a
cast moves tensors and changes what is computed in, never what is stored.

Legend: B batch rows (leading dims), N out features, K in features.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from trimtab.kernels import recompute
from trimtab.layers import adapters, intact, specs
from trimtab.layers.adapters import Adapter
from trimtab.layers.family import seems_read
from trimtab.layers.head_matrix import read_only
from trimtab.layers.weights import Weight
from trimtab.quant import activations
from trimtab.quant.activations import ActivationQuantizer

_NO_WEIGHT = (
    "{name} has no `.weight`: its matrix is stored as {kind} and exists only while it is used. "
    "Use `.dequantize(dtype)` for a copy, `.base` for what is stored, or `trimtab.fold(model)` to merge the adapter. "
    "Where the model itself asks for it, keep the layer in float with a rule: {{match: '{rule}', grid: null}}."
)
_SET_WEIGHT = (
    "{name}.weight cannot be set: its matrix is stored as {kind}, so what is set would not be used. "
    "Use `trimtab.fold(model)` to merge its adapter, or keep the layer in float by a rule: {{match: '{rule}', grid: null}}."
)

_FEW = 8
"""Rows of x up to which a product is bound by reading the weight."""


def marker() -> Tensor:
    """What stands in every file under the name of a float weight that is ours, so that a plain load fails at its shape."""
    return torch.zeros(1, dtype=torch.uint8)


class _Marked:
    """Where `torch.distributed.checkpoint` finds the marker, which it looks up by attributes."""

    weight = marker()


class _Stored(nn.Module):
    """What both modules share: a weight that keeps its dtypes, no `.weight`, and a marker in every state."""

    _borrowed: tuple[Weight] | None
    base: Weight
    reading = False
    """Whether transformers is reading a file into it: its state then holds what the file has to."""
    name = ""
    """Its name in its model, for messages."""
    marked = True
    """Whether its files hold the marker: not of an expert, of whose name transformers would make a stack."""

    def __getattr__(self, name: str) -> Any:
        if name == "base" and self.__dict__.get("_borrowed"):
            return self.__dict__["_borrowed"][0]
        if name == "weight":
            if self.reading:
                return seems_read(self.base.shape)
            raise AttributeError(self._why_no_weight(_NO_WEIGHT))
        return super().__getattr__(name)

    def _why_no_weight(self, said: str) -> str:
        name = self.name or type(self).__name__
        return said.format(name=name, kind=type(self.base).__name__, rule=f"*.{self.name.rpartition('.')[2]}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(self._why_no_weight(_SET_WEIGHT))
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.reading and self._borrowed is None and self.marked:
            destination[f"{prefix}weight"] = marker()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        key = f"{prefix}weight"
        found = state_dict.get(key)
        if found is None:
            return
        if key in unexpected:
            unexpected.remove(key)
        if found.numel() > 1:
            errors.append(f"{key}: is a float weight, and the layer here is stored as {type(self.base).__name__}")

    def _fqn_modifiers(self) -> dict[str, str]:
        return {"weight": "_marker"}

    @property
    def _marker(self) -> _Marked:
        return _Marked()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]


class QuantLinear(_Stored):
    """y = x W^T + bias, with W quantized and an adapter that says what is trained.

    Args:
        base: the stored weight (N, K).
        adapter: what is trained on it, or None.
        bias: frozen bias (N,), or None.
        tied: whether `base` belongs to an embedding: it is then used but not registered, saved or moved here.
        inputs: rounds what the layer reads, or None.
    """

    def __init__(
        self,
        base: Weight,
        adapter: Adapter | None = None,
        bias: Tensor | None = None,
        *,
        tied: bool = False,
        inputs: ActivationQuantizer | None = None,
    ) -> None:
        super().__init__()
        # A tuple hides the module from registration; deepcopy still follows it to the copied embedding's weight.
        self._borrowed = (base,) if tied else None
        if not tied:
            self.base = base
        self.adapter = adapter
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.inputs = inputs
        self.head_dtype: torch.dtype | None = None
        """Of a model's head: the dtype that the model computes in, which follows `.to(dtype)`."""
        self.transposed = False
        """Whether its family keeps its matrix as (K, N), so that files of floats hold it so (`models.transposed`)."""

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.head_dtype is not None:
            if self.adapter is None:
                return read_only(self.base.dequantize(self.head_dtype), self.name)
            return read_only(self.adapter.merged(self.base, self.head_dtype), self.name)
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.head_dtype is not None:
            self.head_dtype = fn(torch.empty(0, dtype=self.head_dtype)).dtype
        return super()._apply(fn, recurse)

    @property
    def in_features(self) -> int:
        """K."""
        return self.base.shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.base.shape[0]

    @property
    def tied(self) -> bool:
        """Whether the weight is borrowed from an embedding."""
        return self._borrowed is not None

    def dequantize(self, dtype: torch.dtype, *, reuse: bool = False) -> Tensor:
        """The (N, K) matrix that multiplies x, in `dtype`: base and adapter, except an output adapter.

        With `reuse` it may lie in memory that the next such call overwrites.
        """
        if self.adapter is None:
            return self.base.dequantize(dtype, reuse=reuse)
        return self.adapter.weight(self.base, dtype, reuse=reuse)

    def weight_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the matrix depends on and that are trained."""
        found = () if self.adapter is None else self.adapter.weight_parameters()
        return tuple(p for p in found if p.requires_grad)

    def _moves_weight(self) -> bool:
        return self.adapter is not None and self.adapter.moves_weight

    def weight_gradients(self, grad_NK: Tensor) -> tuple[Tensor | None, ...]:
        """Their gradients from dL/dW (N, K), which may be overwritten."""
        assert self.adapter is not None
        return self.adapter.weight_gradients(self.base, grad_NK, self.weight_parameters())

    def uses_output(self, dtype: torch.dtype) -> bool:
        """Whether the adapter's gradients come more cheaply from the layer's output than from dL/dW.

        Never with a bias: beside a large one (Qwen2's keys) the product is lost in bfloat16's rounding of the output.
        """
        return self.bias is None and self.adapter is not None and self.adapter.uses_output(self.base, dtype)

    def gradients_from_output(
        self, grad_BN: Tensor, x_BK: Tensor, y_BN: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
        """The matrix, and those gradients, or None where too many levels are clipped."""
        assert self.adapter is not None
        return self.adapter.gradients_from_output(self.base, grad_BN, x_BK, y_BN, self.weight_parameters())

    def forward(self, x_BK: Tensor) -> Tensor:
        """(..., K) to (..., N), computed in x's dtype (or autocast's)."""
        device = x_BK.device.type
        if torch.is_autocast_enabled(device):
            x_BK = x_BK.to(torch.get_autocast_dtype(device))
        if self.tied:  # a device map may have put the embedding elsewhere
            x_BK = x_BK.to(next(self.base.parameters()).device)
        intact.on(x_BK.device, self)
        bias = None if self.bias is None else intact.floating("bias", self.bias, (self.out_features,)).to(x_BK.dtype)
        y = self._product_of_few(x_BK, bias)
        if y is None:
            y = recompute.linear(x_BK, self, bias, self.inputs)
        if self.adapter is None:
            return y
        extra = self.adapter.output(self.base, self._seen(x_BK) if self.adapter.reads_rounded_inputs else x_BK)
        return y if extra is None else y + extra

    def _seen(self, x_BK: Tensor) -> Tensor:
        """What W multiplies."""
        if self.inputs is None:
            return x_BK
        x: Tensor = self.inputs(x_BK.detach())
        return x

    def _product_of_few(self, x_BK: Tensor, bias: Tensor | None) -> Tensor | None:
        """y for a one-token step of generation, where reading W's few bits is all the work; else None."""
        one_token = x_BK.dim() == 3 and x_BK.shape[1] == 1 and x_BK.shape[0] <= _FEW
        if not one_token or torch.is_grad_enabled() or self._moves_weight():
            return None
        y = self.base.product_of_few(self._seen(x_BK).flatten(0, 1))
        return None if y is None else (y if bias is None else y + bias).unflatten(0, x_BK.shape[:2])

    def spec(self) -> dict[str, Any]:
        """What `from_spec` needs to lay this layer out without data."""
        spec = {
            "weight": None if self.tied else self.base.spec(),
            "adapter": None if self.adapter is None else self.adapter.spec(),
            "bias": None if self.bias is None else str(self.bias.dtype).removeprefix("torch."),
        }
        return spec if self.inputs is None else {**spec, "inputs": self.inputs.spec()}

    def extra_repr(self) -> str:
        """Shape, grid and place of the adapter."""
        grid = "dense" if self.base.grid is None else self.base.grid.describe()
        place = "" if self.adapter is None else f", adapter={self.adapter.place}"
        return f"in={self.in_features}, out={self.out_features}, {grid}{place}{', tied' if self.tied else ''}"


class QuantEmbedding(_Stored):
    """Rows of a stored weight.

    Args:
        base: the stored weight (vocabulary, K).
        dtype: dtype of the rows given out; follows `.to(dtype)`.
        padding_idx: kept for libraries that ask for it; it changes nothing in a frozen embedding.
        scale: factor on the rows given out (Gemma multiplies by sqrt(K)).
    """

    def __init__(
        self, base: Weight, dtype: torch.dtype, padding_idx: int | None = None, scale: float | None = None
    ) -> None:
        super().__init__()
        self._borrowed = None
        self.base, self.dtype, self.padding_idx, self.scale = base, dtype, padding_idx, scale

    @property
    def num_embeddings(self) -> int:
        """Rows."""
        return self.base.shape[0]

    @property
    def embedding_dim(self) -> int:
        """K."""
        return self.base.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """int64 ids (...) to rows (..., K)."""
        intact.on(ids.device, self)
        found = ids.flatten().contiguous()  # kernels read ids by their address
        rows = self.base.dequantize(self.dtype, rows=found).view(*ids.shape, self.embedding_dim)
        return rows if self.scale is None else rows * torch.full((), self.scale, dtype=self.dtype, device=rows.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def spec(self) -> dict[str, Any]:
        """What `from_spec` needs to lay this embedding out without data."""
        return {"weight": self.base.spec(), "embedding": {"padding_idx": self.padding_idx, "scale": self.scale}}

    def extra_repr(self) -> str:
        """Shape and grid."""
        grid = "dense" if self.base.grid is None else self.base.grid.describe()
        return f"{self.num_embeddings}, {self.embedding_dim}, {grid}"


def from_spec(
    spec: dict[str, Any], dtype: torch.dtype, tied_to: QuantEmbedding | None = None
) -> "QuantLinear | QuantEmbedding":
    """A layer laid out by its spec, with no data yet (make it under `torch.device("meta")`).

    Args:
        spec: of a `QuantLinear` or `QuantEmbedding`.
        dtype: dtype of rows given out by an embedding.
        tied_to: the embedding whose weight a tied head borrows.
    """
    if "embedding" in spec:
        return QuantEmbedding(specs.from_spec(spec["weight"]), dtype, **spec["embedding"])
    if spec["weight"] is None:
        assert tied_to is not None, "a tied head needs its embedding"
        return QuantLinear(tied_to.base, tied=True)
    base = specs.from_spec(spec["weight"])
    adapter = None if spec["adapter"] is None else adapters.from_spec(spec["adapter"], base)
    bias = None if spec["bias"] is None else torch.empty(base.shape[0], dtype=getattr(torch, spec["bias"]))
    inputs = None if spec.get("inputs") is None else activations.from_spec(spec["inputs"])
    return QuantLinear(base, adapter, bias, inputs=inputs)
