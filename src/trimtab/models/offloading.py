"""A model of ours that others place: what accelerate keeps elsewhere is fetched for each forward, other ways are refused.

Where `device_map="auto"` finds too little memory, accelerate hangs a hook on every module that holds tensors: before the
module's forward it brings them to where it computes, from the disk or the computer's memory, and after it they are gone. A
weight in a layer of ours has no forward that is called: the layer asks it for its matrix. So around a layer's forward the
hooks of all that it holds are called, those of an embedding's weight around its tied head's, too.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from trimtab.errors import UserError
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.models.prepared import quant_layers

_HOOK = "_hf_hook"
"""accelerate's name for the hook of a module."""
_FLATTENS = "casts and flattens what it shards, codes and scales too"
_SIZES = {
    "tp_size": "tensor parallelism",
    "fsdp_size": "FSDP",
    "dp_replicate_size": "data parallelism",
    "pp_size": "pipeline parallelism",
    "ep_size": "expert parallelism",
}
"""Sizes of transformers' `DistributedConfig`, and what of more than one process each of them is."""
_INSTEAD = (
    "part the model by FSDP2: trimtab.load(..., shard=True) or trimtab.shard(model), in a recipe train.shard=fsdp"
)


def follow(model: nn.Module) -> None:
    """Fetch and drop what layers of a model hold around each of their forwards, where accelerate has put it elsewhere."""
    for layer in quant_layers(model).values():
        held = [module for module in _held(layer) if getattr(getattr(module, _HOOK, None), "offload", False)]
        if held:
            layer.register_forward_pre_hook(partial(_fetch, held))
            layer.register_forward_hook(partial(_drop, held), always_call=True)


def refuse_other_parting(config: Any) -> None:
    """Raise a `UserError` where transformers or DeepSpeed is to part a model while it is loaded.

    Args:
        config: the model's, in which transformers notes `distributed_config` (or what `tp_plan` comes to) beforehand.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise UserError(f"DeepSpeed: ZeRO-3 {_FLATTENS}; {_INSTEAD}")
    asked = getattr(config, "distributed_config", None)
    for name, kind in _SIZES.items():
        if (getattr(asked, name, None) or 1) > 1:
            raise UserError(
                f"{kind} ({name} = {getattr(asked, name)}): transformers' plans part float weights, and codes, scales and "
                f"zeros not as one; {_INSTEAD}"
            )


def refuse_deepspeed(stage: int | None) -> None:
    """Raise a `UserError` that names DeepSpeed and its stage, where that is known."""
    raise UserError(f"DeepSpeed: {'it' if stage is None else f'ZeRO-{stage}'} {_FLATTENS}; {_INSTEAD}")


def _held(layer: QuantLinear | QuantEmbedding) -> Iterator[nn.Module]:
    """Modules with tensors that a layer uses without calling their forward; its own come with its own hook."""
    yield from (module for module in layer.modules() if module is not layer)
    if isinstance(layer, QuantLinear) and layer.tied:
        yield from layer.base.modules()


def _fetch(held: list[nn.Module], *_: Any) -> None:
    for module in held:
        getattr(module, _HOOK).pre_forward(module)


def _drop(held: list[nn.Module], *_: Any) -> None:
    for module in held:
        getattr(module, _HOOK).post_forward(module, None)
