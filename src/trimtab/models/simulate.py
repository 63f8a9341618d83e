"""What engines round besides weights, in a prepared model: the inputs of its low-bit layers, and its KV cache.

    W4A8       activations {bits: 8}                            W4A8KV8    and kv {bits: 8}
    W4A8KV4    activations {bits: 8}, kv {bits: 4}              W4A4KV4    activations {bits: 4}, kv {bits: 4}

Both act on every method alike, in training, evaluation and generation, and are saved with the model. Inputs of the head
stay as they are, as engines and LR-QAT's paper leave them; so do queries, and layers whose weight is float. Static ranges
are the least and the largest input of each layer over some training tokens, read from the rounded model (and its rounded
cache) before it is trained.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.layers.linear import QuantLinear
from trimtab.models.kv_cache import install
from trimtab.models.sharding import skeleton_of
from trimtab.models.through import through
from trimtab.models.transformers_bridge import attach, quant_layers
from trimtab.quant.activations import ActivationQuantizer, Activations, KvCache, from_spec, range_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CALIBRATION_TOKENS = 8192
"""Training tokens that a run measures static ranges on."""


def simulate(
    model: "PreTrainedModel",
    *,
    activations: Activations | None = None,
    kv: KvCache | None = None,
    calibration: Tensor | None = None,
) -> None:
    """Round the inputs of low-bit layers, the KV cache, or both from now on, in place.

    Args:
        model: from `load` or `prepare`; where None is given here, what it rounds already stays.
        activations: how to round the inputs of low-bit layers.
        kv: how to round keys and values.
        calibration: token ids (W, L), for static ranges.

    Raises:
        UserError: for a model in which there is nothing to round, or static ranges without calibration tokens.

    Examples:
        >>> tt.simulate(model, activations=tt.Activations(8), kv=tt.KvCache(8))
    """
    static = activations is not None and activations.mode == "static"
    if static and (calibration is None or not calibration.numel()):
        raise UserError("activations: static ranges are measured on tokens; give `calibration` (in a recipe: data)")
    lay_out(model, activations, kv)
    if static:
        assert activations is not None
        assert calibration is not None
        _calibrate(model, activations, calibration)
    attach(model)


def lay_out(model: "PreTrainedModel", activations: Activations | None, kv: KvCache | None) -> None:
    """The same without numbers in static ranges: all that a memory plan needs."""
    if not quant_layers(model):
        raise UserError("activations, kv: the model is not prepared; quantize it first")
    if kv is not None:
        install(model, kv)
    if (skeleton := skeleton_of(model)) is not None:  # what is gathered of it rounds what it rounds
        lay_out(skeleton, activations, kv)
    if activations is None:
        return
    layers = rounding(model)
    if not layers:
        raise UserError("activations: no linear layer has a low-bit weight; give some a grid in `rules`")
    for layer in layers.values():
        layer.inputs = from_spec(asdict(activations)).to(next(layer.base.parameters()).device)


def rounding(model: "PreTrainedModel") -> dict[str, QuantLinear]:
    """The layers whose inputs are rounded."""
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in quant_layers(model).items()
        if isinstance(layer, QuantLinear) and layer is not head and layer.base.grid is not None
    }


@torch.no_grad()
def _calibrate(model: "PreTrainedModel", kind: Activations, ids_WL: Tensor) -> None:
    """Static ranges from one pass over the windows."""
    layers = rounding(model)
    low = {name: torch.tensor(torch.inf) for name in layers}
    high = {name: torch.tensor(-torch.inf) for name in layers}

    def watch(name: str) -> Any:
        def seen(_: Any, args: tuple[Tensor, ...]) -> None:
            least, most = torch.aminmax(args[0])
            low[name], high[name] = torch.minimum(low[name], least.cpu()), torch.maximum(high[name], most.cpu())

        return seen

    def hidden(input_ids: Tensor) -> Tensor:
        states: Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return states

    device = next(model.parameters()).device
    for layer in layers.values():
        layer.inputs = None
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        model.eval()
        for window in ids_WL:
            through(model, model, hidden, input_ids=window.unsqueeze(0).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        if not (low[name] <= high[name]):
            raise UserError(f"{name}: no input was seen in calibration, or one that is not a number; use mode: dynamic")
        on = next(layer.base.parameters()).device
        range_ = range_of(low[name].float().to(on), high[name].float().to(on), kind.bits, kind.symmetric)
        layer.inputs = ActivationQuantizer(kind, range_)
