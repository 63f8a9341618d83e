"""README.md of a folder that `save_pretrained` writes: what it holds, and how it is loaded, with the hub's metadata."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.models.origin import rounded_from
from trimtab.models.prepared import quant_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHOLE = """\
```python
import trimtab
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}")
```
"""
_ADAPTER = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM{config}

base = AutoModelForCausalLM.from_pretrained("{base}"{quantized})
model = PeftModel.from_pretrained(base, "{folder}")
```

or, in a recipe of trimtab, `model: {{path: {base}, adapter: {folder}}}`.
"""
_NF4 = """quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="{table}", bnb_4bit_use_double_quant={double}
)"""


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
    named = base or rounded_from(model)
    head = f"base_model: {named}\n" if named is not None and not Path(named).exists() else ""
    head += f"library_name: {'transformers' if base is None else 'peft'}\npipeline_tag: text-generation\n"
    head += f"tags: [trimtab{'' if base is None else ', lora'}]\n"
    what = "An adapter" if base is not None else "A model in few bits"
    stored = ", ".join(f"{count} layers in {grid}" for grid, count in grids.most_common())
    trained = ", ".join(f"{count} adapters in the {place} place" for place, count in places.items())
    open_ = f" With {trained}: not folded." if trained and base is None else ""
    file.write_text(
        f"---\n{head}---\n\n# {folder.name}\n\n{what}, made with trimtab. {stored}.{open_}\n\n{_how(folder, model, base)}",
        encoding="utf-8",
    )


def _how(folder: Path, model: "PreTrainedModel", base: str | None) -> str:
    """How it is loaded."""
    if base is None:
        return _WHOLE.format(folder=folder.name)
    grids = [x.base.grid for x in quant_layers(model).values() if x.base.grid is not None]
    if not grids:
        return _ADAPTER.format(folder=folder.name, base=base, config="", quantized="")
    kind = _NF4.format(table=grids[0].codebook, double=grids[0].double_quant)  # type: ignore[union-attr]
    return _ADAPTER.format(folder=folder.name, base=base, config=", BitsAndBytesConfig", quantized=f", {kind}")
