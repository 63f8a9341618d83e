"""What `model.save_pretrained` of a prepared model writes: its adapter alone where that is all, else the whole; a card."""

import logging
from pathlib import Path
from typing import Any

from trimtab.layers.linear import QuantLinear
from trimtab.models.adapter_files import belongs_to, write_adapter
from trimtab.models.card import write_card
from trimtab.models.prepared import quant_layers

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
    base = belongs_to(model) if plain else None
    if base is None:
        model.save_pretrained(folder, *args, whole=True, **kwargs)
    elif is_main:
        write_adapter(folder, model, base)
    if not is_main:
        return
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
