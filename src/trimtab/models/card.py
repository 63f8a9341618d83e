"""README.md: the metadata that hubs read, of every model that is written, and the card of what `save_pretrained` writes."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.models.layout import auto_class
from trimtab.models.origin import rounded_from
from trimtab.models.prepared import quant_layers
from trimtab.models.sources import NAMED
from trimtab.quant.grid import CodebookGrid

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB = re.compile(r"\w[\w.-]*/[\w.-]+")
_LIBRARY = {"native": "trimtab", "gguf": "gguf", "mlx": "mlx", "peft": "peft"}
_RELATION = {"peft": "adapter", "dense": "finetune"}
MADE = "made with trimtab."
"""What a card of ours says, by which it is known when another one is to take its place."""
_WHOLE = """\
```python
import trimtab
from transformers import {kind}

model = {kind}.from_pretrained("{folder}")
```
"""
_ADAPTER = """\
```python
from peft import PeftModel
from transformers import {kind}{config}

base = {kind}.from_pretrained("{base}"{options})
model = PeftModel.from_pretrained(base, "{folder}")
```

or, in a recipe of trimtab, `model: {{path: {recipe}, adapter: {folder}}}`.
"""
_NF4 = """quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="{table}", bnb_4bit_use_double_quant={double}
)"""


def hub_id(path: str | None) -> str | None:
    """The hub's name of a model or data set, without a commit; None for a path of this machine."""
    if path is None:
        return None
    name = NAMED[path][2] if path in NAMED else path.partition("@")[0]
    return name if _HUB.fullmatch(name) and not Path(path).exists() else None


def metadata(format_: str, base: str | None, tags: Iterable[str] = (), texts: Iterable[str] = ()) -> str:
    """A card's head; what only this machine has, by its path, is named there by no one.

    Args:
        format_: of the files, as `trimtab formats` lists it.
        base: the model that it was made of, by any path; None where nobody knows.
        tags: besides those of the format.
        texts: what it was trained on, by any paths.
    """
    values: dict[str, Any] = {"library_name": _LIBRARY.get(format_, "transformers"), "pipeline_tag": "text-generation"}
    if (name := hub_id(base)) is not None:
        values |= {"base_model": name, "base_model_relation": _RELATION.get(format_, "quantized")}
    if data := list(dict.fromkeys(name for path in texts if (name := hub_id(path)) is not None)):
        values["datasets"] = data
    values["tags"] = list(dict.fromkeys(["trimtab", *([] if format_ == "peft" else ["quantized"]), format_, *tags]))
    lines = ["---"]
    for key, value in values.items():  # YAML reads JSON's strings as they are
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(v)}" for v in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join([*lines, "---\n"])


def write_card(folder: Path, model: "PreTrainedModel", base: str | None) -> None:
    """Write README.md, unless there is one.

    Args:
        folder: holds the model, or its adapter alone.
        model: what was saved.
        base: what an adapter belongs to; None for a whole model.
    """
    file = folder / "README.md"
    if file.exists():
        return
    layers = quant_layers(model)
    grids = Counter("float" if x.base.grid is None else x.base.grid.describe() for x in layers.values())
    places = Counter(a.place for x in layers.values() if (a := getattr(x, "adapter", None)) is not None)
    head = metadata(*(("native", rounded_from(model)) if base is None else ("peft", base, ["lora"])))
    what = "An adapter" if base is not None else "A quantized model"
    stored = ", ".join(f"{count} layers in {grid}" for grid, count in grids.most_common())
    trained = ", ".join(f"{count} adapters in the {place} place" for place, count in places.items())
    open_ = f" With {trained}: not folded." if trained and base is None else ""
    file.write_text(
        f"{head}\n# {folder.name}\n\n{what}, {MADE} {stored}.{open_}\n\n{_how(folder, model, base)}",
        encoding="utf-8",
    )


def _how(folder: Path, model: "PreTrainedModel", base: str | None) -> str:
    """How it is loaded."""
    kind = auto_class(model.config).__name__
    if base is None:
        return _WHOLE.format(folder=folder.name, kind=kind)
    grids = [x.base.grid for x in quant_layers(model).values() if x.base.grid is not None]
    name, _, revision = base.partition("@")
    options, config = f', revision="{revision}"' if revision else "", ""
    if grids:
        assert isinstance(grids[0], CodebookGrid), "an adapter is saved alone on what bitsandbytes rounds"
        options += f", {_NF4.format(table=grids[0].codebook, double=grids[0].double_quant)}"
        config = ", BitsAndBytesConfig"
    return _ADAPTER.format(folder=folder.name, kind=kind, base=name, recipe=base, config=config, options=options)
