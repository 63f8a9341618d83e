"""The peak of training, predicted from a model that is laid out on the meta device: bytes, by what they are for.

The plan is computed, not estimated, as far as it can be: the model is laid out on the meta device and prepared there, so
the bytes of codes, scales, adapters, gradients and optimizer state are those of the very tensors that will exist; one
forward pass on the meta device, with a hook on every tensor that autograd keeps, gives the activations. What lives for a
moment is a formula, for the two moments at which most of it lives:

    the loss        the shared buffers, the head's weight if it is made from codes, and one chunk of logits
    one layer       the shared buffers, gradients of activations, and what its way of training a weight needs beside them

Where an optimizer step is one micro-batch, its gradients come as its activations go, and are dropped before the next one:
the peak is a maximum over the loss and the layers of backward, and `Plan.apart` is what it lies below the sum. With more
micro-batches the gradients of the first are there when the second has all its activations, and the sum is the peak. Loading
stays below either: beside what is loaded already it holds one float weight, as the shared buffers do in training (but for
GPTQ, see `plan`).

The shared buffers (`kernels.workspace`) are as large as the largest weight that passes through them: W wherever it is
made from packed codes, and dL/dW wherever levels are trained. `benchmarks/memory/memory.py` holds the sum to what
is measured. A heap that keeps freed memory (glibc does, up to 32 MB a tensor) needs more than what lives; no plan
counts that.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from trimtab.kernels import tuning
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import DenseWeight
from trimtab.methods.base import Method
from trimtab.models import decoder
from trimtab.models.asked import softcap
from trimtab.models.prepare import prepare_meta
from trimtab.models.simulate import lay_out
from trimtab.models.transformers_bridge import cast_floats, quant_layers
from trimtab.quant.activations import Activations, KvCache
from trimtab.reading import told
from trimtab.recipe.rules import Rule
from trimtab.training.divergence import LOGITS_CHUNK_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trimtab.memory.settings import Settings
    from trimtab.memory.speed import Speed


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
    """Adam: two moments for each trainable parameter."""
    activations: int
    """What autograd keeps between forward and backward."""
    temporary: int
    """The shared buffers, and the largest that lives beside them for a moment: see above."""
    trainable: int
    """Trainable parameters, not bytes."""
    teacher: int = 0
    """A float or 8-bit model to learn from, in memory as long as training lasts."""
    before: int = 0
    """Peak of what comes before training, a cached teacher or a start; it does not add up with the rest."""
    apart: int = 0
    """Of gradients, activations and temporary: what is never there at once with the others."""
    notes: tuple[str, ...] = ()
    """What this is not the plan of, where a recipe has stages before training."""
    memory: int | None = None
    """Bytes that were said to be there, or None."""
    device: str = "cpu"
    """Where it is to be trained."""
    free: int | None = None
    """Bytes that are free on that device, where it is here and has a memory of its own; else None."""
    beside: int = 0
    """Of the device's memory what its context and libraries take and `free` or `memory` does not leave out."""
    sizes: Mapping[str, int | str] = field(default_factory=dict)
    """Bytes of the tuned model by export format, or why a format does not hold it."""
    settings: "Settings | None" = None
    """What fits into `memory`, where that was given."""
    speed: "Speed | str | None" = None
    """Of its training on this machine, or why it was not tried; None where it was not asked for."""

    @property
    def total(self) -> int:
        """Predicted peak above the interpreter and its libraries."""
        training = (
            self.codes + self.float_parameters + self.adapters + self.gradients
            + self.optimizer + self.activations + self.temporary + self.teacher - self.apart
        )  # fmt: skip
        return max(training, self.before)


@dataclass(frozen=True)
class Teaching:
    """Bytes that distillation adds to a plan (see `plan.teaching`)."""

    resident: int = 0
    """The teacher itself."""
    at_loss: int = 0
    """Its hidden states and logits beside the student's."""
    before: int = 0
    """See `Plan`."""


def peak_of_training(
    model: "PreTrainedModel",
    method: Method,
    rules: Sequence[Rule] | None,
    *,
    micro_batch: int,
    block_tokens: int,
    dtype: torch.dtype,
    checkpointing: bool,
    micro_batches: int = 2,
    moment_bytes: int = 4,
    teaching: Teaching = Teaching(),
    activations: Activations | None = None,
    kv: KvCache | None = None,
) -> Plan:
    """Predict the peak of training.

    Args:
        model: laid out on the meta device (`ModelSource.layout`); it is prepared in place.
        method: what trains it.
        rules: see `rules.resolve`.
        micro_batch: sequences in one forward pass.
        block_tokens: tokens in a sequence.
        dtype: compute dtype.
        checkpointing: whether each block is recomputed in backward.
        micro_batches: forward passes of an optimizer step, one or more.
        moment_bytes: of each of Adam's two moments of a trainable parameter.
        teaching: what a teacher adds.
        activations: how inputs are rounded, or None.
        kv: how keys and values are rounded, or None.
    """
    lay_out_for_training(model, method, rules, dtype=dtype, activations=activations, kv=kv)
    return peak_of(
        model,
        kept_for_backward(model, micro_batch, block_tokens),
        tokens=micro_batch * block_tokens,
        dtype=dtype,
        checkpointing=checkpointing,
        micro_batches=micro_batches,
        moment_bytes=moment_bytes,
        teaching=teaching,
    )


def lay_out_for_training(
    model: "PreTrainedModel",
    method: Method,
    rules: Sequence[Rule] | None,
    *,
    dtype: torch.dtype,
    activations: Activations | None = None,
    kv: KvCache | None = None,
) -> None:
    """Prepare a model on the meta device, in place, as training will have it; arguments as of `peak_of_training`."""
    cast_floats(model, dtype)
    prepare_meta(model, method, rules)
    if activations is not None or kv is not None:
        lay_out(model, activations, kv)


def peak_of(
    model: "PreTrainedModel",
    kept: int,
    *,
    tokens: int,
    dtype: torch.dtype,
    checkpointing: bool,
    micro_batches: int = 2,
    moment_bytes: int = 4,
    teaching: Teaching = Teaching(),
    more: int = 0,
) -> Plan:
    """Predict the peak of training of a model that is laid out for it.

    Args:
        model: of `lay_out_for_training`.
        kept: what autograd keeps of one forward pass, without recomputation: `kept_for_backward` of the whole model.
        tokens: in one forward pass.
        dtype: compute dtype.
        checkpointing: whether each block is recomputed in backward.
        micro_batches: forward passes of an optimizer step, one or more.
        moment_bytes: of each of Adam's two moments of a trainable parameter.
        teaching: what a teacher adds.
        more: blocks that the model has beside those that are laid out, each like the last of them.
    """
    stored = {id(p): p for layer in quant_layers(model).values() for p in layer.parameters()}
    last = list(decoder.blocks(model)[-1].parameters()) if more else []
    parameters = [*model.parameters(), *last * more]
    adapters = [p for p in parameters if p.requires_grad]
    trained = {id(p) for p in adapters}
    config, block = model.config.get_text_config(), kept
    layers = config.num_hidden_layers if not more else len(decoder.blocks(model)) + more
    if checkpointing:
        block = kept // layers
        kept = block + layers * tokens * config.hidden_size * dtype.itemsize
    # Each block's activations are there in the loss, too, but for those that are recomputed later.
    recomputed = block if checkpointing else 0
    at_loss = _at_loss(model, tokens, dtype) + teaching.at_loss - recomputed
    in_layer = _in_layer(model, tokens, dtype)
    return Plan(
        codes=_bytes(p for p in parameters if id(p) in stored and id(p) not in trained),
        float_parameters=_bytes(p for p in parameters if id(p) not in stored),
        adapters=_bytes(adapters),
        gradients=_bytes(adapters),
        optimizer=2 * moment_bytes * sum(p.numel() for p in adapters),
        activations=kept,
        temporary=_buffers(model, dtype) + max(at_loss, in_layer),
        trainable=sum(p.numel() for p in adapters),
        teacher=teaching.resident,
        before=teaching.before,
        apart=_apart(model, kept, recomputed, at_loss, in_layer, more) if micro_batches == 1 else 0,
    )


def _apart(model: "PreTrainedModel", kept: int, block: int, at_loss: int, in_layer: int, more: int) -> int:
    """What activations, gradients and temporary tensors never need together, with no gradients of another micro-batch.

    The peak is that of the loss, with all activations; or of a layer of backward, from the last to the first, with its
    own activations and those of the layers before it, its own gradients and those of the layers after it. `block` is
    the one block that is recomputed, if any.
    """
    inside = [_bytes(p for p in layer.parameters() if p.requires_grad) for layer in decoder.blocks(model)]
    # Of a trained head: they are there in the loss.
    gradients = _bytes(p for p in model.parameters() if p.requires_grad) - sum(inside)
    inside += inside[-1:] * more
    whole = gradients + sum(inside)
    peak = kept + at_loss + gradients
    for number in reversed(range(len(inside))):
        gradients += inside[number]
        left = block + -(-(kept - block) * (number + 1) // len(inside))
        peak = max(peak, left + gradients + in_layer)
    return kept + whole + max(at_loss, in_layer) - peak


def _linears(model: "PreTrainedModel") -> list[QuantLinear]:
    return [layer for layer in quant_layers(model).values() if isinstance(layer, QuantLinear)]


def _graph_bytes(layer: QuantLinear, dtype: torch.dtype) -> int:
    """Bytes for each entry of a weight that autograd makes, in memory of its own; 0 where it does not."""
    return 0 if layer.adapter is None else layer.adapter.graph_bytes(layer.base, dtype)


def _buffers(model: "PreTrainedModel", dtype: torch.dtype) -> int:
    """The two slots of the workspace: the largest weight made from codes, the largest dL/dW; and blocks in float32."""
    weight = gradient = 0
    for layer in _linears(model):
        size = layer.base.shape[0] * layer.base.shape[1] * dtype.itemsize
        if not isinstance(layer.base, DenseWeight) and not _graph_bytes(layer, dtype):
            weight = max(weight, size)
        if layer.weight_parameters() and not layer.uses_output(dtype):
            gradient = max(gradient, size)
    return weight + gradient + tuning.workspace_bytes(dtype)


def _at_loss(model: "PreTrainedModel", tokens: int, dtype: torch.dtype) -> int:
    """One chunk of logits and their exponentials; the counted hidden states and their gradient."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    whole = any(p.requires_grad for p in head.parameters())  # a trained head: all logits and their gradient
    count = 2 * tokens if whole else min(tokens, LOGITS_CHUNK_TOKENS)
    logits = count * config.vocab_size * max(4 + dtype.itemsize, (2 if softcap(config) is None else 4) * 4)
    return logits + 2 * tokens * config.hidden_size * dtype.itemsize


def _in_layer(model: "PreTrainedModel", tokens: int, dtype: torch.dtype) -> int:
    """Gradients of the widest activations, rounded inputs, and what autograd makes of a layer's levels."""
    largest, head = 0, model.get_output_embeddings()
    for layer in _linears(model):
        n, k = layer.base.shape
        activations = 0 if layer is head else 2 * tokens * max(n, k) * dtype.itemsize  # its logits are in the loss
        if layer.inputs is not None:  # x on its way to codes, in float32, and the rounded x
            activations += tokens * k * (4 + dtype.itemsize)
        largest = max(largest, activations + n * k * _graph_bytes(layer, dtype))
    return largest


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def kept_for_backward(model: "PreTrainedModel", micro_batch: int, block_tokens: int) -> int:
    """Bytes that autograd keeps between one forward pass of the decoder and its backward, parameters left out.

    A model on the meta device is run on tensors without data that pass for ones on the CPU: on the meta device itself
    autocast, masks and the choice of an attention kernel fail, or go other ways than in training.
    """
    base: Any = model.base_model
    parameters: dict[str, Tensor] = dict(base.named_parameters())
    imagined = any(p.is_meta for p in parameters.values())
    with ExitStack() as stack:
        if imagined:
            parameters = stack.enter_context(_without_data(base))
        own = {p.untyped_storage()._cdata for p in parameters.values()}
        ids = torch.zeros(micro_batch, block_tokens, dtype=torch.int64, device=next(iter(parameters.values())).device)
        seen = stack.enter_context(saved_storages())
        if imagined:
            stack.enter_context(told(lambda words: f"the model that its config describes cannot be computed ({words})"))
        functional_call(base, parameters, kwargs={"input_ids": ids, "use_cache": False})
    return sum(size for key, (size, _) in seen.items() if key not in own)


@contextmanager
def _without_data(base: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Parameters that have a size and a device but no data, and a base model that can run on them.

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
            for name, p in base.named_parameters()
        }
    with ExitStack() as hooks:
        for layer in quant_layers(base).values():
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
