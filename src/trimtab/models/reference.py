"""The model as it is now, to measure against while it is trained: the reference of DPO, KTO and GRPO.

The reference of a preference method is the model at step 0. Of a LoRA that is the base with its adapter switched off. In
general it is not: LoftQ's factors, an SVD start and an adapter that is trained further act at step 0, too, and scales have
no off. So `reference` keeps what acts now, whatever that is, in a second model of the same class:

    codes, scales, zeros, embeddings, norms      shared with the model, not copied
    adapters that add nothing now                left out
    other adapters                               copied, in the dtype that they act in; a master weight becomes codes

A reference of a model that has just been prepared takes no memory but for LoftQ, SVD starts and adapters from elsewhere,
where it is the size of the adapters. Folding, training and resuming the model leave it as it is.
"""

import copy
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.models.prepared import quant_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_OF: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
"""The reference that somebody chose for a model, as long as both are there."""


def chosen_for(model: nn.Module, made: nn.Module) -> None:
    """Note that this is what a model is to keep to."""
    _OF[model] = weakref.ref(made)


def has_reference(model: nn.Module) -> bool:
    """Whether somebody has chosen what this model is to keep to, and holds it."""
    found = _OF.get(model)
    return found is not None and found() is not None


def reference(model: "PreTrainedModel") -> "PreTrainedModel":
    """A frozen copy that keeps computing what `model` computes now, and shares with it all that is not trained.

    Args:
        model: from `load` or `prepare`, before training: the reference is the model at the time of this call.

    Returns:
        A model for inference. Moving one of the two (`.to(device)`) moves both.

    Examples:
        >>> trainer = DPOTrainer(model, ref_model=tt.reference(model), args=arguments, train_dataset=rows)
    """
    layers = quant_layers(model)
    memo: dict[int, Any] = {}
    for layer in layers.values():
        _share(layer, memo)
    for parameter in model.parameters():
        if id(parameter) not in memo:
            kept = nn.Parameter(parameter.detach().clone(), False) if parameter.requires_grad else parameter
            memo[id(parameter)] = kept
    for buffer in model.buffers():
        memo.setdefault(id(buffer), buffer)
    made = copy.deepcopy(model, memo)
    for (
        module
    ) in made.modules():  # what others put before a forward is bound to the first model (TRL's heads, accelerate)
        for name in ("forward", "_original_forward"):
            vars(module).pop(name, None)
    chosen_for(model, made)
    return made.eval()


def _share(layer: QuantLinear | QuantEmbedding, memo: dict[int, Any]) -> None:
    """Note, for `deepcopy`, what becomes of a layer's parts: its weight is shared, its adapter kept or left out."""
    base, adapter = layer.base, None
    if isinstance(layer, QuantLinear) and layer.adapter is not None:
        base, adapter = layer.adapter.frozen(layer.base)
        memo[id(layer.adapter)] = adapter
        memo.update((id(p), None) for p in layer.adapter.parameters())
    memo[id(layer.base)] = base
    memo.update((id(p), p) for p in layer.base.parameters())
