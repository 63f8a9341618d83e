"""Bytes: measured while a run lasts, and predicted before anything is loaded.

The plan is computed, not estimated, as far as it can be: the model is laid out on the meta device and prepared there, so
the bytes of codes, scales, adapters, gradients and optimizer state are those of the very tensors that will exist; one
forward pass on the meta device, with a hook on every tensor that autograd keeps, gives the activations. Only what lives
for a moment (one layer's float weight and its gradient, one chunk of logits) is a formula.

"Resident" is anonymous resident memory: file-mapped pages, which the kernel can drop, are reported beside it.
"""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from trimtab import hf
from trimtab.methods.base import Method
from trimtab.preparing import place, targets
from trimtab.rules import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
LOGITS_CHUNK_TOKENS = 128
"""Tokens whose logits exist at once in training (see `loss`)."""


def reset_peak() -> None:
    """Start a new peak where the system can (Linux); elsewhere the peak is that of the whole process."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def peak_bytes() -> int:
    """Largest resident memory of this process since `reset_peak`, in bytes."""
    if _STATUS.exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Anonymous resident memory of this process now, in bytes (all of it where the system does not tell)."""
    return _status("RssAnon") if _STATUS.exists() else peak_bytes()


def trim() -> None:
    """Hand freed heap pages back to the system.

    glibc keeps them between small tensors that live on: loading a 65 MB model in 4 bits left up to 250 MB resident.
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if give_back is not None:
        give_back(0)


def available_bytes() -> int | None:
    """Memory that this system could still give, in bytes; None where it does not tell (it does on Linux)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass(frozen=True)
class Plan:
    """Predicted bytes of a training run, by what they are for."""

    codes: int
    """Stored weights: codes, scales, zeros, absmax; dense weights under adapters."""
    float_parameters: int
    """What no rule touched: norms, biases, float embeddings and heads."""
    adapters: int
    gradients: int
    optimizer: int
    """AdamW: two float32 numbers for each trainable one."""
    activations: int
    """What autograd keeps between forward and backward."""
    temporary: int
    """The largest of: one layer's weight, levels and gradient; one chunk of logits with the head's float weight."""
    trainable: int
    """Trainable numbers, not bytes."""

    @property
    def total(self) -> int:
        """Predicted peak above the interpreter and its libraries."""
        return (
            self.codes + self.float_parameters + self.adapters + self.gradients
            + self.optimizer + self.activations + self.temporary
        )  # fmt: skip


def plan(
    model: "PreTrainedModel",
    method: Method,
    rules: list[Rule] | None,
    *,
    micro_batch: int,
    block_tokens: int,
    dtype: torch.dtype,
    checkpointing: bool,
) -> Plan:
    """Predict the peak of training.

    Args:
        model: laid out on the meta device (`loading.skeleton`); it is prepared in place.
        method: what trains it.
        rules: see `rules.resolve`.
        micro_batch: sequences in one forward pass.
        block_tokens: tokens in a sequence.
        dtype: compute dtype.
        checkpointing: whether each block is recomputed in backward.
    """
    hf.cast_floats(model, dtype)
    largest = prepare_meta(model, method, rules)
    stored = {id(p): p for layer in hf.quant_layers(model).values() for p in layer.parameters()}
    adapters = [p for p in model.parameters() if p.requires_grad]
    trained = {id(p) for p in adapters}
    codes = _bytes(p for i, p in stored.items() if i not in trained)
    floats = _bytes(p for p in model.parameters() if id(p) not in stored)
    numbers = sum(p.numel() for p in adapters)
    kept = kept_for_backward(model, micro_batch, block_tokens)
    layers = model.config.get_text_config().num_hidden_layers
    hidden = model.config.get_text_config().hidden_size
    if checkpointing:
        kept = kept // layers + layers * micro_batch * block_tokens * hidden * dtype.itemsize
    vocabulary = model.config.get_text_config().vocab_size
    # Logits in the compute dtype and as float32, and their gradient; the head's weight where it is not float anyway.
    logits = LOGITS_CHUNK_TOKENS * vocabulary * (dtype.itemsize + 8) + vocabulary * hidden * dtype.itemsize
    weight = largest * (3 * 4 + 2 * dtype.itemsize)
    return Plan(
        codes=codes,
        float_parameters=floats,
        adapters=_bytes(adapters),
        gradients=_bytes(adapters),
        optimizer=2 * 4 * numbers,
        activations=kept,
        temporary=max(logits, weight),
        trainable=numbers,
    )


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def prepare_meta(model: "PreTrainedModel", method: Method, rules: list[Rule] | None) -> int:
    """Prepare a meta-device model, and return the largest number of weights in one trained layer."""
    largest = 0
    for target in targets(model, method, rules):
        old: Any = model.get_submodule(target.name)
        source = old.base if hasattr(old, "base") else old.weight.detach()
        place(model, target, source, method)
        if target.kind in ("linear", "head"):
            largest = max(largest, target.shape[0] * target.shape[1])
    hf.untie(model)
    hf.freeze(model)
    return largest


def kept_for_backward(model: "PreTrainedModel", micro_batch: int, block_tokens: int) -> int:
    """Bytes that autograd keeps between one forward pass of the decoder and its backward, parameters left out.

    A model on the meta device is run on tensors without data that pass for ones on the CPU: on the meta device itself
    autocast, masks and the choice of an attention kernel fail, or go other ways than in training.
    """
    decoder: Any = model.base_model
    parameters: dict[str, Tensor] = dict(decoder.named_parameters())
    with ExitStack() as stack:
        if any(p.is_meta for p in parameters.values()):
            parameters = stack.enter_context(_without_data(decoder))
        own = {p.untyped_storage()._cdata for p in parameters.values()}
        ids = torch.zeros(micro_batch, block_tokens, dtype=torch.int64, device=next(iter(parameters.values())).device)
        seen = stack.enter_context(saved_storages())
        functional_call(decoder, parameters, kwargs={"input_ids": ids, "use_cache": False})
    return sum(size for key, (size, _) in seen.items() if key not in own)


@contextmanager
def _without_data(decoder: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Parameters that have a size and a device but no data, and a decoder that can run on them.

    Positions and masks stay real, since transformers looks at their values. Only our layers fill tensors that they make
    themselves, so the mode, under which new tensors have no data either, is on while they run.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def enter(*_: Any) -> None:
        mode.__enter__()

    def leave(*_: Any) -> None:
        mode.__exit__(None, None, None)

    with mode:
        parameters = {
            name: torch.empty(p.shape, dtype=p.dtype, device="cpu", requires_grad=p.requires_grad)
            for name, p in decoder.named_parameters()
        }
    with ExitStack() as hooks:
        for layer in hf.quant_layers(decoder).values():
            hooks.callback(layer.register_forward_pre_hook(enter).remove)
            hooks.callback(layer.register_forward_hook(leave, always_call=True).remove)
        yield parameters


@contextmanager
def saved_storages() -> Iterator[dict[int, tuple[int, Tensor]]]:
    """Collect every storage that autograd saves in this context: its bytes, and a tensor that keeps its address taken."""
    seen: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        seen[storage._cdata] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield seen
