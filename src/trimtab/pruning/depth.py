"""Whole decoder layers, dropped by block influence: the alternative that keeps every width.

    BI = 1 - mean over tokens of cos(x_in, x_out)        (Men et al., ShortGPT, arXiv 2403.03853, eq. 1)

x_in and x_out are the hidden states before and after a layer: a layer that hardly turns them is hardly missed. Influences
are measured once, on the whole model, and the least go.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.devices import double
from trimtab.errors import UserError
from trimtab.models.architecture import architecture_of
from trimtab.models.decoder import set_blocks
from trimtab.pruning.importance import check_finite
from trimtab.pruning.structures import Layout, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def influence(model: "PreTrainedModel", windows_WL: Tensor, micro_batch: int = 1) -> list[float]:
    """Block influence of every decoder layer on calibration windows (W, L)."""
    layers, training = decoder_layers(model), model.training
    total = torch.zeros(len(layers), dtype=torch.float64)
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(_turned(total, i), with_kwargs=True).remove)
        stack.callback(model.train, training)
        model.eval()
        for some in windows_WL.split(micro_batch):
            model.base_model(input_ids=some.to(device), use_cache=False)
    check_finite(total, "the influence of a layer")
    return [float(v) for v in 1 - total / windows_WL.numel()]


def _turned(total: Tensor, i: int) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        total[i] += double(F.cosine_similarity(before.float(), after.float(), dim=-1)).sum().cpu()

    return hook


def least(about: Layout, influences: Sequence[float], *, count: int, keep: Sequence[int]) -> list[int]:
    """The `count` layers of least influence that are not in `keep`, in ascending order."""
    free = [i for i in range(about.layers) if i not in keep]
    if count >= about.layers or count > len(free):
        raise UserError(
            f"prune: cannot drop {count} of {about.layers} layers, {about.layers - len(free)} of them kept: "
            "one must be left; drop fewer"
        )
    return sorted(sorted(free, key=lambda i: influences[i])[:count])


def drop(model: "PreTrainedModel", gone: Sequence[int]) -> None:
    """Take these decoder layers out, in place, and renumber the others."""
    layers: Any = decoder_layers(model)
    kept = [i for i in range(len(layers)) if i not in gone]
    set_blocks(model, [layers[i] for i in kept])
    for number, i in enumerate(kept):
        for module in layers[i].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    config = model.config
    for key in architecture_of(model).by_layer:
        values = getattr(config, key, None)
        if values is not None:
            setattr(config, key, [copy.copy(values[i]) for i in kept])
    config.num_hidden_layers = len(kept)
