"""A model in, a prepared model out: which layers are ours, swapping them one at a time, and folding them back.

`targets` decides everything before a weight is touched. `place` swaps one layer. `fold` turns what was trained into what
is stored.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from trimtab.errors import UserError
from trimtab.kernels import tuning
from trimtab.layers.adapter import Adapter, FoldKind
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.layers.movement import Movement, movement
from trimtab.methods.base import Method, Source, base_weight
from trimtab.models.atomic import put_back_on_failure
from trimtab.models.conversion import require_names_that_last
from trimtab.models.decoder import embedding_scale
from trimtab.models.finite import look_at, require_finite, require_held, tell_small
from trimtab.models.opening import hold_the_rest, open_layers
from trimtab.models.origin import note_rounded
from trimtab.models.replaceable import refuse
from trimtab.models.sharding import is_sharded
from trimtab.models.share import tell
from trimtab.models.starting import Filling, Start, place_started
from trimtab.models.targets import Target, targets
from trimtab.models.transformers_bridge import attach, freeze, quant_layers, untie
from trimtab.models.transposed import replace_by
from trimtab.quant.grid import Grid
from trimtab.recipe.rules import Rule, parse_rules
from trimtab.words import and_more

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNTRAINED = "_trimtab_untrained"
_log = logging.getLogger("trimtab")


def place(model: "PreTrainedModel", target: Target, source: Source, method: Method) -> None:
    """Swap one layer of the model for ours, made from `source`."""
    old = model.get_submodule(target.name)
    if target.kind == "embedding":
        dtype = old.dtype if isinstance(old, QuantEmbedding) else old.weight.dtype
        scale = old.scale if isinstance(old, QuantEmbedding) else embedding_scale(model, old)
        base = base_weight(source, target.grid)
        new: QuantLinear | QuantEmbedding = QuantEmbedding(base, dtype, old.padding_idx, scale)  # type: ignore[arg-type]
    elif target.kind == "tied":
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, QuantEmbedding)
        new = QuantLinear(embedding.base, tied=True)
    else:
        base, adapter = target.method(method).build(source, target.grid)
        inputs = old.inputs if isinstance(old, QuantLinear) and target.grid is not None else None
        new = QuantLinear(base, adapter, getattr(old, "bias", None), inputs=inputs)
    if target.untrained:
        vars(model).setdefault(_UNTRAINED, {})[target.name] = target.untrained
    if target.kind != "tied":
        look_at(model, target.name, base, source)
    new.train(old.training)
    replace_by(model, target.name, new)


def fitted_starts(model: "PreTrainedModel") -> list[str]:
    """How the fitted starts of its adapters were found, one line for each way: how often, and what error they leave."""
    found: dict[str, list[float]] = {}
    for layer in quant_layers(model).values():
        if isinstance(layer, QuantLinear) and layer.adapter is not None and layer.adapter.fitted is not None:
            how, left = layer.adapter.fitted
            found.setdefault(how, []).append(left)
    return [
        f"{how}: {len(e)} layers, {sum(e) / len(e):.2f} of the rounding error left" for how, e in sorted(found.items())
    ]


def finish(model: "PreTrainedModel") -> None:
    """After the last layer: see that it can be saved, freeze all but adapters, and tell transformers."""
    untie(model)
    hold_the_rest(model)
    tell_small(model)
    _tell_untrained(model)
    require_names_that_last(model, quant_layers(model))
    freeze(model)
    attach(model)


def _tell_untrained(model: nn.Module) -> None:
    """Say, in one line for each reason, which layers keep a grid that the method cannot train on."""
    noted: dict[str, str] = vars(model).pop(_UNTRAINED, {})
    for reason in dict.fromkeys(noted.values()):
        names = [name for name, why in noted.items() if why == reason]
        _log.warning("%s: kept as in the file, and not trained: %s", and_more(names), reason)


def prepare(
    model: "PreTrainedModel",
    method: Method,
    rules: Sequence[Rule] | Sequence[dict[str, Any]] | None = None,
    *,
    start: Start | None = None,
) -> "PreTrainedModel":
    """Quantize a model in memory and attach a method's adapters, in place.

    Args:
        model: a causal language model with float layers, or one of ours with folded layers.
        method: for example `trimtab.methods.LrQat(rank=32)`.
        rules: `Rule`s or a recipe's mappings; None for the method's own grid on every linear layer but the head.
        start: how the layers in the decoder blocks find their codes: `trimtab.Gptq(tokens=...)`, or
            `trimtab.Blockwise(tokens=...)`, which trains one block after another; None rounds to nearest.

    Returns:
        The model itself. Its float layers are kept until the last quantized one is in place, so that a failure leaves the
        model as it was. `trimtab.load` quantizes while it reads, so that the float model never exists.

    Raises:
        UserError: naming the layer, for what is not a plain float layer (of bitsandbytes, peft, FP8), or does not fit.

    Examples:
        >>> model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")
        >>> tt.prepare(model, tt.methods.LrQat(rank=32), [{"match": "*", "grid": {"bits": 4, "group": 64}}])
    """
    prepare_by(model, method, parse_rules(rules), start)
    tell(model)
    return model


def prepare_by(model: "PreTrainedModel", method: Method, rules: Sequence[Rule] | None, start: Start | None) -> None:
    """`prepare` with rules that are parsed already. A model that it fails on is left as it was."""
    tuning.for_models()
    todo = targets(model, method, rules)

    def read(target: Target) -> Source:
        old: Any = model.get_submodule(target.name)
        source: Source = old.base if isinstance(old, QuantLinear | QuantEmbedding) else old.weight.detach()
        if target.kind != "tied":
            require_finite(source, f"{target.name}.weight")
        return source

    def put(target: Target, how: Callable[[Source], Source] | None = None) -> None:
        source = read(target)
        place(model, target, source if how is None else how(source), method)

    first = not quant_layers(model)
    with put_back_on_failure(model):
        open_layers(model, (target.name for target in todo))
        for target in todo:
            refuse(target.name, model.get_submodule(target.name), loaded=True)
        if start is None:
            for target in todo:
                put(target)
        else:
            place_started(model, todo, method, start, Filling(read, put, lambda _: None))
        finish(model)
    as_it_was = first and start is None and not method.rounds_itself
    note_rounded(model, getattr(model, "name_or_path", None) if as_it_was else None)


def prepare_meta(model: "PreTrainedModel", method: Method, rules: Sequence[Rule] | None) -> None:
    """Prepare a model on the meta device, in place: what plans of memory and of files are computed from."""
    todo = targets(model, method, rules)
    open_layers(model, (target.name for target in todo))
    for target in todo:
        old: Any = model.get_submodule(target.name)
        place(model, target, old.base if hasattr(old, "base") else old.weight.detach(), method)
    untie(model)
    hold_the_rest(model)
    freeze(model)


@dataclass(frozen=True)
class LayerFold:
    """What folding did to one layer."""

    name: str
    place: str
    action: Literal["folded", "merged", "kept"]
    kind: FoldKind
    error: float
    """Relative Frobenius error of the folded or merged weight; 0 for bitwise."""
    differing: int
    """Weights whose float32 value in what is stored is not the one that was trained, base and adapter together."""
    moved: Movement
    """What training moved of the stored weight."""


def fold(model: "PreTrainedModel", *, merge: bool = False) -> list[LayerFold]:
    """Fold what was trained into what is stored, in place.

    Adapters in the levels and in the zeros fold into codes, scales and zeros, bit for bit. Output adapters (LoRA, QLoRA,
    Q-BaRA) fit in no low-bit weight: they stay adapters, or with `merge` become part of a dense copy of the weight.

    Args:
        model: from `load` or `prepare`, trained.
        merge: whether output adapters are merged into dense weights.

    Returns:
        For each layer how it was folded (`bitwise` or `algebraic`) and what that changed.

    Raises:
        UserError: where an adapter beside rounded inputs is to be merged, or what was trained is not finite; nothing is
            folded then.

    Examples:
        >>> report = tt.fold(model)
        >>> tt.save(model, "tuned", tokenizer)
    """
    todo = [
        (n, x, x.adapter)
        for n, x in quant_layers(model).items()
        if isinstance(x, QuantLinear) and x.adapter is not None
    ]
    if is_sharded(model):
        raise UserError(
            "fold: the model is sharded; fold the whole one: `whole = tt.gather(model)` in every process, then in the "
            "first (in the others it is None) tt.fold(whole) and tt.save(whole, ...)"
        )
    for name, layer, adapter in todo:
        _check_fold(name, layer, adapter, merge)
    report = []
    for name, layer, adapter in todo:
        folded = adapter.fold(layer.base)
        if adapter.stays(merge):
            still = movement(layer.base, layer.base)
            report.append(LayerFold(name, adapter.place, "kept", folded.kind, folded.error, 0, still))
            continue
        with torch.no_grad():
            trained = adapter.merged(layer.base, torch.float32)
            differing = int((folded.weight.dequantize(torch.float32) != trained).sum())
        action: Literal["folded", "merged"] = "folded" if adapter.moves_weight else "merged"
        moved = movement(layer.base, folded.weight)
        report.append(LayerFold(name, adapter.place, action, folded.kind, folded.error, differing, moved))
        layer.base, layer.adapter = folded.weight, None
    attach(model)
    return report


def _check_fold(name: str, layer: QuantLinear, adapter: Adapter, merge: bool) -> None:
    if merge and not adapter.moves_weight and layer.inputs is not None:
        raise UserError(
            f"{name}: its adapter reads inputs that its weight sees rounded, so no weight equals the two together; "
            "keep it (`merge: false`)"
        )
    for part, p in adapter.named_parameters():
        if not p.isfinite().all():  # a code is made of any number, of NaN, too
            raise UserError(
                f"{name}: {part} holds NaN or infinite values, so its training diverged; go back to an earlier checkpoint, "
                "and lower the learning rate"
            )
        if part in ("scale", "offset") and isinstance(layer.base.grid, Grid):
            require_held(name, p, layer.base.grid)
