"""From a path to a prepared model, quantizing while it reads: peak memory is the packed model plus one float layer.

The model is laid out on the meta device, the rules decide every layer's grid from names and shapes, and then each layer
is read, quantized and put in place before the next is read. What a path may be is in `sources`.
"""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from trimtab.errors import UserError
from trimtab.kernels import heap
from trimtab.layers.weights import Weight
from trimtab.methods.base import Method
from trimtab.methods.rtn import Rtn
from trimtab.models.decoder import block_names
from trimtab.models.gptq import Gptq
from trimtab.models.layout import require_lasting, tensors_of
from trimtab.models.origin import note_rounded, remember
from trimtab.models.prepare import Target, finish, place, place_calibrated, prepare_by, round_by_gptq, targets
from trimtab.models.share import tell
from trimtab.models.sources import ModelSource, fill, fill_where, open_source, require_finite, require_shape
from trimtab.models.transformers_bridge import untie
from trimtab.recipe.rules import Rule, parse_rules


def load(
    path: str,
    method: Method | None = None,
    rules: Sequence[Rule] | Sequence[dict[str, Any]] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    source: ModelSource | None = None,
    start: Gptq | None = None,
    quiet: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """A prepared model and its tokenizer.

    Args:
        path: see `trimtab.models.sources`.
        method: what will train it; None for round-to-nearest (a saved model is then loaded as it is).
        rules: `Rule`s or a recipe's mappings; None for the method's default.
        dtype: dtype to compute in, and of everything that stays float.
        source: an already opened source of this path, to save parsing it again.
        start: how layers find their codes, see `prepare`; GPTQ has one decoder block in float at a time.
        quiet: whether to log no line about what share of the parameters is in few bits (`share`).

    Raises:
        UserError: naming the file, tensor or layer that is wrong.
    """
    found = source or open_source(path)
    model = _prepared(path, found, method, parse_rules(rules), dtype, start)
    if not quiet:
        tell(model)
    return model, found.tokenizer()


def _prepared(
    path: str,
    found: ModelSource,
    method: Method | None,
    parsed: Sequence[Rule] | None,
    dtype: torch.dtype,
    start: Gptq | None,
) -> PreTrainedModel:
    chosen = method or Rtn()
    if found.prepared:
        model = _as_saved(found, dtype)
        if method is not None or parsed is not None:
            prepare_by(model, chosen, parsed, start)
        return model
    model = found.layout(dtype=dtype)
    require_lasting(path, model)
    found.bind(model)
    todo = targets(model, chosen, parsed)
    if start is None:
        for target in todo:
            _put(model, target, found, chosen, dtype)
        rounds = not chosen.rounds_itself and not path.endswith(".gguf")
        note_rounded(model, path if rounds else None)
        return _complete(model, found)

    def put(target: Target, hessian_KK: Tensor | None) -> None:
        how = None if hessian_KK is None else partial(round_by_gptq, target=target, start=start, hessian_KK=hessian_KK)
        _put(model, target, found, chosen, dtype, how)

    blocks = tuple(f"{name}." for name in block_names(model))

    def enter(block: str) -> None:
        fill_where(model, found, lambda name: name.startswith(f"{block}.") if block else not name.startswith(blocks))

    place_calibrated(model, todo, chosen, start, put, enter)
    return _complete(model, found)


def _put(
    model: PreTrainedModel,
    target: Target,
    source: ModelSource,
    method: Method,
    dtype: torch.dtype,
    how: Callable[[Tensor | Weight], Tensor | Weight] | None = None,
) -> None:
    """Read one layer and put ours in its place, its weight first rounded by `how` if given."""
    if target.kind == "tied":
        return place(model, target, torch.empty(0), method)
    name = f"{target.name}.weight"
    weight = source.read(name, dtype if target.grid is None else None)
    require_shape(source, name, weight.shape, target.shape)
    require_finite(weight, name)
    fill(model.get_submodule(target.name), "bias", f"{target.name}.bias", source)
    if target.grid is None:  # it stays in float
        weight = weight.dequantize(dtype) if isinstance(weight, Weight) else weight.to(dtype)
    place(model, target, weight if how is None else how(weight), method)
    del weight
    heap.trim()
    return None


def load_float(path: str, *, dtype: torch.dtype = torch.bfloat16, source: ModelSource | None = None) -> PreTrainedModel:
    """The untouched model in `dtype`: a GGUF file is dequantized."""
    source = source or open_source(path)
    if source.prepared:
        raise UserError(f"model.path: {path}: saved by trimtab, so there is no float model to compare with")
    model = source.layout(dtype=dtype)
    source.bind(model)
    return _complete(model, source)


def load_as_it_is(path: str, *, dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, Any]:
    """A model as it stands, saved by trimtab or in float (a GGUF file is dequantized), and its tokenizer.

    Args:
        path: see `trimtab.models.sources`.
        dtype: to compute in.

    Raises:
        UserError: if it has no tokenizer, or as `open_source`.
    """
    source = open_source(path)
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise UserError(f"{path}: was saved without a tokenizer; add its tokenizer files to it")
    model = _as_saved(source, dtype) if source.prepared else load_float(path, dtype=dtype, source=source)
    return model, tokenizer


def _as_saved(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """A model that trimtab saved, by transformers' own loader, after a look at its names: it would only warn."""
    source.bind(source.layout())
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype)
    for name, p in model.named_parameters():
        if p.is_floating_point():
            require_finite(p.detach(), name)
    remember(model, source.path)
    return model


def _complete(model: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
    """Read what no rule touched, tie what is tied, freeze."""
    untie(model)
    fill_where(model, source, lambda _: True)
    if getattr(model, "all_tied_weights_keys", {}):
        model.tie_weights(recompute_mapping=False)
    left = [name for name, _, _, tensor in tensors_of(model) if tensor.is_meta]
    assert not left, left
    finish(model)
    model.eval()
    if (source.path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source.path)
    remember(model, source.path)
    gc.collect()
    heap.trim()
    return model
