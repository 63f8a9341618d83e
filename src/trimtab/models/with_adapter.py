"""Any model that a recipe could name, as it computes: with the PEFT LoRA that lies beside it, where one does.

a directory, a .gguf file, a hub id       as `load_as_it_is`
the same, and a PEFT LoRA directory       the adapter beside the base, neither merged nor rounded
a PEFT LoRA directory alone               its base is what its adapter_config.json names
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.devices import CPU
from trimtab.errors import UserError
from trimtab.layers.linear import QuantLinear
from trimtab.methods.lora import Lora
from trimtab.models import located
from trimtab.models.load import load, load_as_it_is
from trimtab.models.peft_init import ranks_of, start_from
from trimtab.models.sources import ModelSource, open_source
from trimtab.models.transformers_bridge import quant_layers
from trimtab.reading import read_mapping
from trimtab.recipe.rules import Placement, Rule


def base_and_adapter(path: str, adapter: str | None = None) -> tuple[str, str | None]:
    """The base and the adapter that a path means: a PEFT directory alone names its base itself.

    Raises:
        UserError: if it names none, or two adapters are given.
    """
    file = Path(path).expanduser() / "adapter_config.json"
    if not file.is_file() or (file.parent / "config.json").is_file():
        return path, adapter
    if adapter is not None:
        raise UserError(f"{path}: is a PEFT adapter itself; name its base, and this adapter beside it, or it alone")
    base = read_mapping(file, "save the adapter again").get("base_model_name_or_path")
    if not isinstance(base, str) or not base or "\0" in base:
        raise UserError(
            f"{file}: names no base model (base_model_name_or_path); name the base, and the adapter beside it"
        )
    beside = file.parent / base
    return (str(beside) if beside.exists() else str(base)), path


def load_model(
    path: str, adapter: str | None = None, *, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU
) -> tuple[PreTrainedModel, Any]:
    """A model as it stands and its tokenizer, with an adapter where one is given.

    Args:
        path: see above.
        adapter: directory of a PEFT LoRA, or None.
        dtype: to compute in.
        device: to compute on.

    Raises:
        UserError: as `open_source`, `load_as_it_is` and `start_from`.
    """
    path, adapter = base_and_adapter(path, adapter)
    if adapter is None:
        return load_as_it_is(path, dtype=dtype, device=device)
    ranks, source = ranks_of(adapter), open_source(path)
    places = _places(source)
    rules = [Rule(name, places.get(name, "float"), rank) for name, rank in ranks.items()]
    most = max(ranks.values())
    method = Lora(rank=most, alpha=float(most))
    model, tokenizer = load(path, method, rules, dtype=dtype, device=device, source=source, quiet=True)
    start_from(model, adapter)
    model.eval()
    if tokenizer is None:
        raise UserError(f"{path}: was saved without a tokenizer; add its tokenizer files to it")
    return model, tokenizer


def _places(source: ModelSource) -> dict[str, Placement]:
    """The grids that the layers of a saved model have: an adapter leaves them as they are."""
    if not source.prepared:
        return {}
    layers = quant_layers(source.layout())
    return {name: layer.base.grid or "float" for name, layer in layers.items() if isinstance(layer, QuantLinear)}


def disk_bytes(path: str, adapter: str | None = None) -> int:
    """Bytes of the files that a model, and its adapter, are read from; tokenizers are counted."""
    path, adapter = base_and_adapter(path, adapter)
    files = located.files_of(path)
    if adapter is not None:
        files += [f for f in Path(adapter).expanduser().glob("adapter_*") if f.is_file()]
    return sum(file.stat().st_size for file in files)
