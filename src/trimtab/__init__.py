"""Fine-tune a quantized language model in the memory you have, and get back exactly the model you trained.

    import trimtab as tt

    model = tt.prepare(model, tt.methods.LrQat(rank=32), rules)     # or tt.load(path, method, rules)
    ...                                                             # train the adapters
    tt.fold(model)
    tt.save(model, "out", tokenizer)

    tt.run("recipe.yaml")                                           # or all of it, as the command line does (`api`)

Importing the package also teaches `AutoModelForCausalLM.from_pretrained` to read what `save` wrote. It imports nothing
else: every name is fetched when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from trimtab.models import registration

if TYPE_CHECKING:
    from trimtab import methods
    from trimtab.api import chat, evaluate, export, harness, overview, parity, plan, prune, run, search, verify
    from trimtab.errors import UserError
    from trimtab.formats.native.write import save
    from trimtab.formats.push import push
    from trimtab.kernels.tuning import tune
    from trimtab.layers.rates import param_groups
    from trimtab.models.block_start import Blockwise
    from trimtab.models.gptq import Gptq
    from trimtab.models.load import load
    from trimtab.models.prepare import fold, prepare
    from trimtab.models.reference import reference
    from trimtab.models.sharding import gather, shard
    from trimtab.models.simulate import simulate
    from trimtab.pages.report import write_report
    from trimtab.pipeline.comparison import compare
    from trimtab.quant.activations import Activations, KvCache
    from trimtab.quant.grid import CodebookGrid, Grid
    from trimtab.recipe.recipe import Recipe

__version__ = "0.2.0"
__all__ = [
    "Activations", "Blockwise", "CodebookGrid", "Gptq", "Grid", "KvCache", "Recipe", "UserError",
    "chat", "compare", "evaluate", "export", "fold", "gather", "harness", "load", "methods", "overview", "param_groups",
    "parity", "plan", "prepare", "prune", "push", "reference", "run", "save", "search", "shard", "simulate", "tune",
    "verify", "write_report",
]  # fmt: skip

_HOME = {
    "Activations": "quant.activations",
    "Blockwise": "models.block_start",
    "CodebookGrid": "quant.grid",
    "Gptq": "models.gptq",
    "Grid": "quant.grid",
    "KvCache": "quant.activations",
    "Recipe": "recipe.recipe",
    "UserError": "errors",
    "compare": "pipeline.comparison",
    "fold": "models.prepare",
    "gather": "models.sharding",
    "load": "models.load",
    "param_groups": "layers.rates",
    "prepare": "models.prepare",
    "push": "formats.push",
    "reference": "models.reference",
    "save": "formats.native.write",
    "shard": "models.sharding",
    "simulate": "models.simulate",
    "tune": "kernels.tuning",
    "write_report": "pages.report",
}
"""The file of every public name that is not in `api`. No room bears the name of a public function: importing it would put
the room in the function's place."""

registration.install()
registration.readers(
    {
        ".gguf": "trimtab.formats.gguf.read:GgufSource",
        "trimtab": "trimtab.formats.native.read:NativeSource",
        "gptq": "trimtab.formats.gptq.read:opened",
        "awq": "trimtab.formats.awq.read:opened",
        "compressed-tensors": "trimtab.formats.compressed_tensors.read:opened",
        "bitsandbytes": "trimtab.formats.bitsandbytes.read:opened",
        "auto-round": "trimtab.formats.auto_round.read:opened",
        "mlx": "trimtab.formats.mlx.read:opened",
        "fp8": "trimtab.formats.fp8.read:opened",
        "mxfp4": "trimtab.formats.mxfp4.read:Mxfp4Source",
    }
)


def __getattr__(name: str) -> Any:
    """What needs torch and transformers is imported when it is first used."""
    if name == "methods":
        return importlib.import_module("trimtab.methods")
    if name in __all__:
        return getattr(importlib.import_module(f"trimtab.{_HOME.get(name, 'api')}"), name)
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
