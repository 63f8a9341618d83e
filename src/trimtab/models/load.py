"""From a path to a prepared model, quantizing while it reads: peak memory is the packed model plus one float layer.

The model is laid out on the meta device, the rules decide every layer's grid from names and shapes, and then each layer
is read, quantized and put in place before the next is read. What a path may be is in `sources`. Of a model that is to be
sharded among processes each decoder block is sharded as soon as it is whole (`arriving`).
"""

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.devices import CPU, resolve
from trimtab.errors import UserError
from trimtab.kernels import heap
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.layers.weights import Weight
from trimtab.methods.base import Method
from trimtab.methods.rtn import Rtn
from trimtab.models import believable
from trimtab.models.arriving import Arrivals, fill_stored
from trimtab.models.finite import require_finite
from trimtab.models.layout import move_made, require_lasting, tensors_of
from trimtab.models.opening import open_layers
from trimtab.models.origin import note_rounded, remember
from trimtab.models.prepare import finish, place, prepare_by
from trimtab.models.reload import reload
from trimtab.models.sharding import Parting, mesh_of
from trimtab.models.share import tell
from trimtab.models.sources import (
    ModelSource,
    fill,
    open_source,
    require_shape,
)
from trimtab.models.starting import Filling, Start, place_started
from trimtab.models.targets import Target, targets
from trimtab.models.transformers_bridge import cast_floats, set_reading, untie
from trimtab.models.weight_error import weight_error
from trimtab.models.whole import checking
from trimtab.processes import take_device
from trimtab.recipe.rules import Rule, parse_rules

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def load(
    path: str,
    method: Method | None = None,
    rules: Sequence[Rule] | Sequence[dict[str, Any]] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = CPU,
    source: ModelSource | None = None,
    start: Start | None = None,
    quiet: bool = False,
    errors: dict[str, float] | None = None,
    shard: "DeviceMesh | bool" = False,
    verify: bool = True,
) -> tuple[PreTrainedModel, Any]:
    """Load a model, quantize it while it is read, and attach a method's adapters.

    Args:
        path: a directory, a .gguf file, a hub id, or a model that trimtab saved.
        method: what will train it; None rounds to nearest, and loads a saved model as it is.
        rules: `Rule`s or a recipe's mappings; None for the method's default.
        dtype: dtype to compute in, and of everything that stays float.
        device: where it is to compute: each tensor goes there when it is read, and is quantized there. `auto` (a GPU if
            there is one), `cpu`, `cuda`, `cuda:N`, `mps` or `xpu`; the CPU unless told, as in transformers.
        source: an already opened source of this path, to save parsing it again.
        start: how layers find their codes, see `prepare`; one decoder block is in float at a time.
        quiet: whether to log no line about what share of the parameters is quantized (`share`).
        errors: a mapping that receives the relative rounding error of every layer that is rounded here, by its name.
        shard: shard the model among the processes as `trimtab.shard` does, but while it is read: each decoder block as soon
            as it is there, so that at most one of them is whole at a time. True for all processes, or a mesh of torch.
            Every process reads all of the files. On GPUs that `device` gives no number, each takes that of its LOCAL_RANK,
            which becomes the current one.
        verify: whether a folder that trimtab wrote is compared with its manifest first: large files are read once for it
            on a machine. TRIMTAB_VERIFY=0 in the environment leaves it out everywhere.

    Returns:
        The prepared model and its tokenizer.

    Raises:
        UserError: naming the file, tensor or layer that is wrong.

    Examples:
        >>> rules = [{"match": "*", "grid": {"bits": 4, "group": 64}}]
        >>> model, tokenizer = tt.load("HuggingFaceTB/SmolLM2-135M-Instruct", tt.methods.LrQat(rank=32), rules)
    """
    if shard is not False and ":" not in str(device):
        take_device(str(device), "device")
    with checking(verify):
        found, where = source or open_source(path), resolve(device, "device")
        model = _prepared(path, found, method, parse_rules(rules), dtype, where, start, errors, _parting(shard, where))
    if not quiet:
        tell(model)
    return model, found.tokenizer()


def _parting(shard: "DeviceMesh | bool", device: torch.device) -> Parting | None:
    return None if shard is False else Parting(mesh_of(device.type) if shard is True else shard)


def _prepared(
    path: str,
    found: ModelSource,
    method: Method | None,
    parsed: Sequence[Rule] | None,
    dtype: torch.dtype,
    device: torch.device,
    start: Start | None,
    errors: dict[str, float] | None,
    parting: Parting | None,
) -> PreTrainedModel:
    chosen, changes = method or Rtn(), method is not None or parsed is not None
    if found.prepared and parting is None:
        model = _as_saved(found, dtype, device)
        if changes:
            prepare_by(model, chosen, parsed, start)
        return model
    model = found.layout(dtype=dtype)
    if found.prepared:
        cast_floats(model, dtype)
    else:
        require_lasting(path, model)
    found.bind(model)
    move_made(model, device)
    todo = targets(model, chosen, parsed) if changes or not found.prepared else []
    open_layers(model, (target.name for target in todo))
    arrivals = Arrivals(model, found, device, parting)
    if start is None or not todo:
        arrivals.expect([target.name for target in todo])
        for target in todo:
            _put(model, target, found, chosen, dtype, device, errors=errors)
            arrivals.placed(target.name)
        rounds = not chosen.rounds_itself and found.floats
        note_rounded(model, path if rounds else None)
        return _complete(model, found, device, arrivals)

    def read(target: Target) -> Tensor | Weight:
        return _source(model, target, found, dtype, device)

    def put(target: Target, how: Callable[[Tensor | Weight], Tensor | Weight] | None) -> None:
        _put(model, target, found, chosen, dtype, device, how, errors)

    place_started(model, todo, chosen, start, Filling(read, put, arrivals.enter))
    return _complete(model, found, device, arrivals)


def _put(
    model: PreTrainedModel,
    target: Target,
    source: ModelSource,
    method: Method,
    dtype: torch.dtype,
    device: torch.device,
    how: Callable[[Tensor | Weight], Tensor | Weight] | None = None,
    errors: dict[str, float] | None = None,
) -> None:
    """Read one layer and put ours in its place, its weight first rounded by `how` if given."""
    if target.kind == "tied":
        return place(model, target, torch.empty(0), method)
    stored = isinstance(model.get_submodule(target.name), QuantLinear | QuantEmbedding)
    weight = _source(model, target, source, dtype, device)
    place(model, target, weight if how is None else how(weight), method)
    if errors is not None and target.grid is not None and not stored:
        errors[target.name] = weight_error(model.get_submodule(target.name).base, weight)  # type: ignore[arg-type]
    del weight
    heap.trim()
    return None


def _source(
    model: PreTrainedModel, target: Target, source: ModelSource, dtype: torch.dtype, device: torch.device
) -> Tensor | Weight:
    """What a layer is made of: its stored weight where it is ours, else what the file has."""
    layer = model.get_submodule(target.name)
    if isinstance(layer, QuantLinear | QuantEmbedding):
        fill_stored(layer, target.name, source, device)
        return layer.base
    return _read(model, target, source, dtype, device)


def _read(
    model: PreTrainedModel, target: Target, source: ModelSource, dtype: torch.dtype, device: torch.device
) -> Tensor | Weight:
    """The weight of a layer that is not ours yet; its bias comes in place."""
    name = f"{target.name}.weight"
    weight = source.read(name, dtype if target.grid is None else None, device)
    require_shape(source, name, weight.shape, target.shape)
    require_finite(weight, name)
    fill(model.get_submodule(target.name), "bias", f"{target.name}.bias", source, device)
    if target.grid is not None:
        return weight
    kept = weight.dequantize(dtype) if isinstance(weight, Weight) else weight.to(dtype)  # it stays in float
    require_finite(kept, name)
    return kept


def load_float(
    path: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CPU,
    source: ModelSource | None = None,
    shard: "DeviceMesh | bool" = False,
) -> PreTrainedModel:
    """The untouched model in `dtype`, on a device: a GGUF file is dequantized. `shard` as of `load`."""
    source = source or open_source(path)
    if source.prepared:
        raise UserError(f"model.path: {path}: saved by trimtab, so there is no float model to compare with")
    model = source.layout(dtype=dtype)
    source.bind(model)
    move_made(model, device)
    return _complete(model, source, device, Arrivals(model, source, device, _parting(shard, device)))


def load_as_it_is(
    path: str, *, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU
) -> tuple[PreTrainedModel, Any]:
    """A model as it stands, saved by trimtab or in float (a GGUF file is dequantized), and its tokenizer.

    Args:
        path: see `trimtab.models.sources`.
        dtype: to compute in.
        device: to compute on.

    Raises:
        UserError: if it has no tokenizer, or as `open_source`.
    """
    source = open_source(path)
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise UserError(f"{path}: was saved without a tokenizer; add its tokenizer files to it")
    if source.prepared:
        return _as_saved(source, dtype, device), tokenizer
    return load_float(path, dtype=dtype, device=device, source=source), tokenizer


def _as_saved(source: ModelSource, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model that trimtab saved, by transformers' own loader, after a look at its names: it would only warn."""
    source.bind(source.layout())
    model = reload(source.path, dtype, device)
    remember(model, source.path)
    return model


def _complete(model: PreTrainedModel, source: ModelSource, device: torch.device, arrivals: Arrivals) -> PreTrainedModel:
    """Read what no rule touched, tie what is tied, freeze; part what is not sharded yet, where it is to be."""
    untie(model)
    arrivals.fill_all()
    set_reading(model, False)
    if getattr(model, "all_tied_weights_keys", {}):
        model.tie_weights(recompute_mapping=False)
    left = [name for name, _, _, tensor in tensors_of(model) if tensor.is_meta]
    assert not left, left
    finish(model)
    model.eval()
    generation = believable.read_generation(source.path)
    if generation is not None:
        model.generation_config = generation
    remember(model, source.path)
    arrivals.part_the_rest()
    gc.collect()
    heap.trim()
    return model
