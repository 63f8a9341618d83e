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

from trimtab import methods, registration
from trimtab.activations import Activations, KvCache
from trimtab.errors import UserError
from trimtab.grid import CodebookGrid, Grid

if TYPE_CHECKING:
    from trimtab.chain import run
    from trimtab.export.native import save
    from trimtab.gptq import Gptq
    from trimtab.loading import load
    from trimtab.preparing import fold, prepare
    from trimtab.simulation import simulate

__version__ = "0.1.0"
__all__ = [
    "Activations", "CodebookGrid", "Gptq", "Grid", "KvCache", "UserError",
    "fold", "load", "methods", "prepare", "run", "save", "simulate",
]  # fmt: skip

_LAZY = {
    "Gptq": "trimtab.gptq",
    "fold": "trimtab.preparing",
    "load": "trimtab.loading",
    "prepare": "trimtab.preparing",
    "run": "trimtab.chain",
    "save": "trimtab.export.native",
    "simulate": "trimtab.simulation",
}

registration.install()


def __getattr__(name: str) -> Any:
    """What needs heavier libraries is imported when it is first used."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
