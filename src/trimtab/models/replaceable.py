"""Which layers of a model may become ours: only those that are known to compute `x W^T + b` with a plain float weight.

    linear       exact `nn.Linear` (and `SAME_AS_LINEAR`) of the language model, and `Conv1D` (`transposed`)
    head         the linear layer after it, where it has a weight of its own; else it is tied and follows the embedding
    embedding    exact `nn.Embedding`, or one that multiplies its rows by a number as Gemma's does

Everything else stays in float, each kind with a reason that the rules, the errors and the line after `prepare` can give:
routers (a rounded router sends tokens to other experts), vision and audio towers with their projectors, layers whose
owner reads their weight itself, weights that two layers share, and look-alikes (subclasses of `Conv1D`, fused experts,
layers that other libraries put in place of `nn.Linear`).

The road not taken: `isinstance(module, nn.Linear)`. Every library that quantizes or adapts subclasses it, so that a layer
of 8-bit codes was read as one of floats.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.layers.experts import stacks
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.models.architecture import language_model, text_config
from trimtab.models.opening import layers_of_experts
from trimtab.models.transposed import as_linear, is_linear
from trimtab.recipe.rules import Kind

SAME_AS_LINEAR = ("FalconLinear",)
"""Subclasses of `nn.Linear` in transformers that compute the same."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

ROUTER = "a router, whose outputs choose experts"
ELSEWHERE = "not a part of the language model"
READ = "its owner reads its weight itself"
SHARED = "shares its weight with another layer"
OTHERWISE = "computes otherwise than a linear layer"

_ROUTERS = re.compile(r"Router|Gating$|Mo[eE]\w*Gate$")
_SEES_OR_HEARS = re.compile(
    r"(^|_)(vision|visual|image|img|audio|speech|video|multi_?modal|mm|aligner|connector|projector)(_|$|\d)"
)


class Layers(NamedTuple):
    """The layers of a model, by name."""

    offered: dict[str, tuple[Kind, nn.Module]]
    """Those that rules can give a grid."""
    left: dict[str, str]
    """Those that stay in float whatever the rules say, and why."""


def layers_of(model: Any) -> Layers:
    """Every layer that rules can speak of, and every linear layer of which they cannot."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    config = text_config(model)
    modules = dict(model.named_modules())
    elsewhere, shared, counts = outside_of(model), _shared(model, head, embedding), _expert_counts(config)
    models = {type(m) for m in modules.values() if hasattr(type(m), "get_input_embeddings")}
    offered: dict[str, tuple[Kind, nn.Module]] = {}
    left: dict[str, str] = {}
    for name, kept in modules.items():
        module = as_linear(kept)
        if module is embedding:
            if isinstance(module, QuantEmbedding) or plain_embedding(module):
                offered[name] = ("embedding", module)
            elif isinstance(module, nn.Embedding):
                left[name] = f"a {type(module).__name__}, which is not a plain embedding"
        elif module is head and _linear(module):
            offered[name] = ("tied" if _tied(model, name, head, embedding) else "head", module)
        elif isinstance(module, QuantLinear):
            offered[name] = ("linear", module)
        elif isinstance(module, nn.Linear):
            reason = _reason(name, module, modules, models, elsewhere, shared, counts, config)
            if reason is None:
                offered[name] = ("linear", module)
            else:
                left[name] = reason
        elif stacks(module):
            experts = dict(layers_of_experts(name, module))
            if f"{name}.".startswith(elsewhere):
                left |= dict.fromkeys(experts, ELSEWHERE)
            else:
                offered |= {own: ("linear", layer) for own, layer in experts.items()}
        elif any(kind.__name__ == "Conv1D" for kind in type(module).__mro__):
            left[name] = f"a {type(module).__name__}, which is not a plain Conv1D"
    return Layers(offered, left)


def _reason(
    name: str,
    module: nn.Linear,
    modules: dict[str, nn.Module],
    models: set[Any],
    elsewhere: tuple[str, ...],
    shared: set[str],
    counts: set[int],
    config: Any,
) -> str | None:
    """Why a linear layer stays in float; None if it may become ours, or be refused by `refuse`."""
    owner, last = modules[name.rpartition(".")[0]], name.rpartition(".")[2]
    if f"{name}.".startswith(elsewhere):
        return ELSEWHERE
    if _routes(name, module, modules, owner, counts):
        return ROUTER
    if type(module) is not nn.Linear and type(module).__module__.startswith(
        ("transformers.models.", "torch.nn.modules.")
    ):
        return None if type(module).__name__ in SAME_AS_LINEAR else OTHERWISE
    if name in shared:
        return SHARED
    if _slow_path_only(owner, config):
        return None
    owner_kind: Any = type(owner)
    return READ if last in _reads(owner_kind) or any(last in _reads(kind, deep=True) for kind in models) else None


def _routes(name: str, module: nn.Linear, modules: dict[str, nn.Module], owner: nn.Module, counts: set[int]) -> bool:
    if is_router(name, modules):
        return True
    beside = any("experts" in child for child, _ in owner.named_children())
    chooses = module.out_features in counts
    return (beside and (chooses or module.out_features == 1)) or (
        chooses and name.rpartition(".")[2] in ("gate", "router", "wg")
    )


def is_router(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module or one that it is a part of says by its class that it chooses experts."""
    parts = name.split(".")
    above = (modules[".".join(parts[: i + 1])] for i in range(len(parts)))
    return any(_ROUTERS.search(type(module).__name__) for module in above)


def _expert_counts(config: Any) -> set[int]:
    """Every number of experts that a config speaks of."""
    values = vars(config) if config is not None else {}
    return {
        v
        for k, v in values.items()
        if isinstance(v, int) and "expert" in k and "per_tok" not in k and "size" not in k and v > 1
    }


def outside_of(model: Any) -> tuple[str, ...]:
    """Prefixes of the names of everything that is not of the language model."""
    modules = dict(model.named_modules())
    text, whole = text_config(model), getattr(model, "config", None)
    configs = {type(text), type(whole)}
    found = []
    for name, module in modules.items():
        theirs = getattr(module, "config", None) if hasattr(module, "get_input_embeddings") else None
        if (name and theirs is not None and type(theirs) not in configs) or _SEES_OR_HEARS.search(
            name.rpartition(".")[2]
        ):
            found.append(f"{name}.")
    if text is not whole:
        decoder = language_model(model)
        inside = next((n for n, m in modules.items() if m is decoder), "")
        if inside:  # beside the decoder there is the head, and nothing else that is ours
            found += [f"{n}." for n, m in modules.items() if n and not _on_the_way(n, inside) and _linear(m)]
    return tuple(found)


def _on_the_way(name: str, inside: str) -> bool:
    return f"{name}.".startswith(f"{inside}.") or f"{inside}.".startswith(f"{name}.")


def _shared(model: Any, head: Any, embedding: Any) -> set[str]:
    """Names of layers whose weight another layer has, too; the head and the embedding have rules of their own."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None and module is not head and module is not embedding:
            owners.setdefault(id(weight), []).append(name)
    found = {name for names in owners.values() if len(names) > 1 for name in names}
    for tied, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        found |= {tied.removesuffix(".weight"), source.removesuffix(".weight")}
    return found


def _tied(model: Any, name: str, head: Any, embedding: Any) -> bool:
    """Whether the head multiplies by the embedding's own weight."""
    if isinstance(head, QuantLinear):
        return head.tied
    weight = embedding._parameters.get("weight") if isinstance(embedding, nn.Module) else None
    if head.weight is weight:
        return True
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    return head.weight.is_meta and f"{name}.weight" in keys


def _linear(module: Any) -> bool:
    return isinstance(module, QuantLinear) or is_linear(module)


def linears_beside(model: Any, name: str) -> frozenset[str]:
    """Last parts of the names of the linear layers that one layer's owner has, its own among them."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return frozenset(child for child, module in owner.named_children() if _linear(module))


def plain_embedding(module: nn.Module) -> bool:
    """Whether an embedding gives out rows of its weight, or rows times a number that it declares as Gemma's does."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    return (
        type(module) is nn.Embedding
        or hasattr(module, "scalar_embed_scale")
        or getattr(module, "embed_scale", None) == 1.0
    )


@cache
def _reads(owner: type, *, deep: bool = False) -> frozenset[str]:
    """The layers `x` whose `self.x.weight` a module's class reads in what it computes; with `deep`, any `y.x.weight`."""
    found = set[str]()
    pattern = re.compile(r"\.(\w+)\.weight\b" if deep else r"\bself\.(\w+)\.weight\b")
    for name, function in inspect.getmembers(owner, inspect.isfunction):
        if name in ("__init__", "_init_weights", "reset_parameters") or function.__module__ in _GENERAL:
            continue
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):  # made at run time: nothing to read
            continue
        found |= set(pattern.findall(source))
    return frozenset(found)


_GENERAL = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation.utils")
"""What every module and model inherits."""


def _slow_path_only(owner: nn.Module, config: Any) -> bool:
    """BLOOM reads weights only to repeat the sums of a model that was trained in parallel parts."""
    return hasattr(owner, "pretraining_tp") and getattr(config, "pretraining_tp", 1) == 1


# ---- what is refused ----------------------------------------------------------------------------------------------

_NO_GRADIENT: Mapping[str, str] = {
    "reformer": "its reversible blocks pass no gradient on where what is before them is frozen, and its attention hashes "
    "at random",
}
"""Families that cannot be tuned with all but adapters frozen, and why."""


def refuse_model(model: Any) -> None:
    """Refuse a model that another library has wrapped or quantized.

    Raises:
        UserError: naming the library and the remedy, or the family.
    """
    family = getattr(text_config(model), "model_type", "")
    if family in _NO_GRADIENT:
        raise UserError(f"{family} models are not tuned: {_NO_GRADIENT[family]}; use a model of another family")
    for name, module in model.named_modules():
        library = type(module).__module__.partition(".")[0]
        if library == "peft":
            what = f"{name}: is" if name else "the model is"
            raise UserError(
                f"{what} wrapped by peft ({type(module).__name__}); fold its adapter in first "
                "(`model = model.merge_and_unload()`), or prepare the model that it was made from"
            )
        looks_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
        if looks_linear and not _linear(module) and library not in ("torch", "transformers", "trimtab"):
            raise UserError(
                f"{name}: is a {library} {type(module).__name__}, so the model is no longer one of plain floats; "
                "load the float model"
            )
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if quantizer is not None and str(getattr(method, "value", method)) != "trimtab":
        raise UserError(
            f"the model is already quantized by {getattr(method, 'value', method)}; load the float model instead "
            "(`from_pretrained` without a `quantization_config`)"
        )


def refuse(name: str, module: nn.Module, *, loaded: bool) -> None:
    """Refuse a layer that is not a plain float one.

    Args:
        name: of the layer.
        module: the layer.
        loaded: whether its weight must be there: False for a model that is laid out on the meta device.

    Raises:
        UserError: naming the layer, what it is and the remedy.
    """
    if isinstance(module, QuantLinear | QuantEmbedding):
        return
    kind = type(module)
    if isinstance(module, nn.Linear) and kind is not nn.Linear and kind.__name__ not in SAME_AS_LINEAR:
        raise UserError(
            f"{name}: is a {kind.__module__.partition('.')[0]} {kind.__name__}, not a plain nn.Linear; load the float "
            "model, "
            "or keep the layer as it is with a rule (`grid: null`)"
        )
    weight: Any = module._parameters.get("weight")
    if weight is None:
        raise UserError(f"{name}: has no parameter `weight`; take off what was put on it, or keep it (`grid: null`)")
    if type(weight.data) is not Tensor:
        raise UserError(
            f"{name}: its weight is a {type(weight.data).__name__}, not a plain tensor; prepare the float model, before it "
            "is quantized or sharded by others"
        )
    if weight.dtype not in FLOATS:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise UserError(f"{name}: its weight is {dtype}, which means nothing without its scale; load the float model")
    if loaded and weight.is_meta:
        raise UserError(
            f"{name}: its weight is on the meta device, so there is nothing to quantize; load the model first"
        )
    if hooked := next(_attached(module), None):
        raise UserError(
            f"{name}: has {hooked}, which would be lost; remove it first (for a `device_map`: "
            "`accelerate.hooks.remove_hook_from_submodules(model)`), and put it on the prepared model"
        )


def _attached(module: nn.Module) -> Iterator[str]:
    if "forward" in vars(module):
        yield "a `forward` of its own"
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if getattr(module, hooks):
            yield "a hook"
