"""Float buffers that no file holds (rotary frequencies, scales of embeddings): a cast leaves them whole, or is saved.

transformers recomputes such buffers whenever a model is loaded, whole in float32. A cast, `model.to(bfloat16)`, rounds them
on the way, so that the model that was trained and the model that is reloaded would turn by other angles: 0.2
in the logits of a small Llama. So

    casts         leave float buffers as they were made (`guard`), as transformers' own loader does
    saving        compares them with those that a reload will make (`not_remade`), and stores what differs: buffers that
                  were cast before the model was prepared, or past modules by `buffer.data = ...`
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.layers.linear import QuantEmbedding, QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def guard(model: nn.Module) -> None:
    """Let float buffers keep their dtypes in every cast of the model or of a part of it."""
    for module in model.modules():
        floats = any(b is not None and b.is_floating_point() for b in module._buffers.values())
        if floats and not isinstance(module, QuantLinear | QuantEmbedding):
            module._apply = partial(_apply_but_keep, module)  # type: ignore[method-assign]


def _apply_but_keep(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    before = {name: b for name, b in module._buffers.items() if b is not None and b.is_floating_point()}
    type(module)._apply(module, fn, recurse)
    for name, old in before.items():
        new = module._buffers[name]
        if new is not None and new.dtype != old.dtype:
            module._buffers[name] = old.to(new.device)
    return module


def not_remade(model: "PreTrainedModel", dtype: torch.dtype) -> dict[str, Tensor]:
    """The float buffers that no state holds and that a reload in this dtype would make otherwise."""
    ours = {n: b for n, b in _unsaved(model).items() if b.is_floating_point()}
    if not ours:
        return {}
    made = _unsaved(_made_anew(model, dtype))
    return {
        name: buffer
        for name, buffer in ours.items()
        if name in made and not _same(buffer, made[name]) and not _moves_while_used(name, ours, made)
    }


def _same(ours: Tensor, made: Tensor) -> bool:
    return ours.dtype == made.dtype and torch.equal(ours.cpu(), made.cpu())


def _moves_while_used(name: str, ours: dict[str, Tensor], made: dict[str, Tensor]) -> bool:
    """Whether these are frequencies that follow the length of the text: what they start from is kept beside them."""
    start = name.replace("inv_freq", "original_inv_freq")
    return (
        "original" not in name and start != name and start in ours and start in made and _same(ours[start], made[start])
    )


def _unsaved(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are in no state dict, by name."""
    return {
        f"{name}.{key}" if name else key: module._buffers[key]
        for name, module in model.named_modules()
        for key in module._non_persistent_buffers_set
        if module._buffers.get(key) is not None
    }


def _made_anew(model: "PreTrainedModel", dtype: torch.dtype) -> nn.Module:
    """The float model that the config describes, as a reload lays it out."""
    from trimtab.models.layout import laid_out  # which imports models, and those import quantizers, and so this file

    config: Any = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.random.fork_rng(devices=[]):
        return laid_out(partial(type(model)._from_config, config, dtype=dtype))


def keep_with_state(model: nn.Module, names: list[str]) -> None:
    """Make these buffers a part of the model's state, so that they are saved, and read instead of made."""
    for name in names:
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._non_persistent_buffers_set.discard(key)
