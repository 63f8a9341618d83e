"""What `model.save_pretrained` of a prepared model writes: its adapter alone where that is all, else the whole; a card."""

import json
import logging
from pathlib import Path
from typing import Any

from trimtab.layers.linear import QuantLinear
from trimtab.models.adapter_files import belongs_to, write_adapter
from trimtab.models.card import MADE, write_card
from trimtab.models.origin import check_not_read_from
from trimtab.models.prepared import quant_layers
from trimtab.models.transformers_bridge import QUANT_METHOD
from trimtab.models.whole import forget

_log = logging.getLogger("trimtab")


def save_for_people(model: Any, folder: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """`Prepared.save_pretrained` where a person, or a trainer at its end, calls it.

    Args:
        model: prepared.
        folder: to write into.
        args: the rest of the arguments of `PreTrainedModel.save_pretrained`.
        kwargs: and these.
    """
    named = dict(zip(("is_main_process", "state_dict"), args, strict=False)) | kwargs
    is_main, plain = (
        named.get("is_main_process", True),
        named.get("state_dict") is None and not named.get("push_to_hub"),
    )
    check_not_read_from(model, folder)
    base = belongs_to(model) if plain else None
    if base is None:
        model.save_pretrained(folder, *args, whole=True, **kwargs)
    elif is_main:
        forget(folder)
        write_adapter(folder, model, base)
    if not is_main:
        return
    _clear_other_form(folder, whole=base is None)
    write_card(folder, model, base)
    if base is not None:
        _log.info("%s: the adapter alone, which belongs to %s; trimtab.save writes the whole model", folder, base)
        return
    layers = [x for x in quant_layers(model).values() if isinstance(x, QuantLinear) and x.adapter is not None]
    open_ = sum(x.adapter.moves_weight for x in layers if x.adapter is not None)
    if open_:
        _log.warning(
            "%s: saved before folding: %d layers still have what trains them; to serve it, trimtab.fold(model) first",
            folder,
            open_,
        )


_OF_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
_OF_MODELS = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


def _clear_other_form(folder: Path, whole: bool) -> None:
    """Remove what the other form left in a folder that both are saved into: an adapter's config beside a whole model has
    transformers load the float base and the old adapter, without a word.
    """
    if not whole and not _ours(folder / "config.json"):
        return  # a float model that somebody keeps there, which is not ours to remove
    for pattern in _OF_ADAPTERS if whole else _OF_MODELS:
        for file in folder.glob(pattern):
            file.unlink()
    card = folder / "README.md"
    if card.is_file() and MADE in card.read_text(encoding="utf-8"):
        card.unlink()


def _ours(config: Path) -> bool:
    """Whether a model's config is one that we wrote."""
    about = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") if config.is_file() else None
    return about is not None and bool(about.get("quant_method") == QUANT_METHOD)
