"""All or nothing: a model that something goes wrong with is put back as it was, module for module.

Checks before the first layer is swapped find most of what can fail, but not all: a weight that is not finite, a Hessian
that is singular, memory that runs out, Ctrl-C. A model of which half is ours and half is not computes something that
nobody asked for, so the modules that are taken out are kept until the last is in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_TABLES = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


@contextmanager
def put_back_on_failure(model: nn.Module) -> Iterator[None]:
    """Restore the model's modules, attributes, classes, config and `requires_grad` if the block does not end well."""
    modules = [(m, type(m), dict(vars(m)), [vars(m)[t].copy() for t in _TABLES]) for m in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    config: Any = getattr(model, "config", None)
    values = None if config is None else dict(vars(config))
    whole = False
    try:
        yield
        whole = True
    finally:  # Ctrl-C, too
        for module, kind, attributes, tables in [] if whole else modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for table, kept in zip(_TABLES, tables, strict=True):
                attributes[table].clear()
                attributes[table].update(kept)
        for p, requires_grad in [] if whole else wanted:
            p.requires_grad_(requires_grad)
        if values is not None and not whole:
            vars(config).clear()
            vars(config).update(values)
