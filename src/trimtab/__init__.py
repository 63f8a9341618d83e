"""Fine-tune a quantized language model in the memory you have, and get back exactly the model you trained.

    import trimtab as tt

    model = tt.prepare(model, tt.methods.LrQat(rank=32), rules)     # or tt.load(path, method, rules)
    ...                                                             # train the adapters
    tt.fold(model)
    tt.save(model, "out", tokenizer)

Importing the package also teaches `AutoModelForCausalLM.from_pretrained` to read what `save` wrote.
"""

import importlib
from typing import TYPE_CHECKING, Any

from trimtab.errors import UserError
from trimtab.models import registration

if TYPE_CHECKING:
    from trimtab import methods
    from trimtab.formats.native.write import save
    from trimtab.models.gptq import Gptq
    from trimtab.models.load import load
    from trimtab.models.prepare import fold, prepare
    from trimtab.models.simulate import simulate
    from trimtab.pipeline.stages import run
    from trimtab.quant.activations import Activations, KvCache
    from trimtab.quant.grid import CodebookGrid, Grid

__version__ = "0.1.0"
__all__ = [
    "Activations", "CodebookGrid", "Gptq", "Grid", "KvCache", "UserError",
    "fold", "load", "methods", "prepare", "run", "save", "simulate",
]  # fmt: skip

_LAZY = {
    "Activations": "trimtab.quant.activations",
    "CodebookGrid": "trimtab.quant.grid",
    "Gptq": "trimtab.models.gptq",
    "Grid": "trimtab.quant.grid",
    "KvCache": "trimtab.quant.activations",
    "fold": "trimtab.models.prepare",
    "load": "trimtab.models.load",
    "prepare": "trimtab.models.prepare",
    "run": "trimtab.pipeline.stages",
    "save": "trimtab.formats.native.write",
    "simulate": "trimtab.models.simulate",
}

registration.install()
registration.readers(
    {"gguf": "trimtab.formats.gguf.read:GgufSource", "trimtab": "trimtab.formats.native.read:NativeSource"}
)


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first used, so that the command line can answer without."""
    if name == "methods":
        return importlib.import_module("trimtab.methods")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
