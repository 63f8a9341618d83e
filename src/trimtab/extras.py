"""Which libraries stand behind which extra, and one line for a user who lacks one: said before any work is done.

pip install trimtab              quantize, load, save, fold, plan, verify
pip install 'trimtab[train]'     and train;  [all] for everything
"""

from importlib.util import find_spec

from trimtab.errors import UserError

LIBRARIES = {
    "train": ("trl", "accelerate", "datasets"),
    "gguf": ("gguf",),
    "eval": ("lm_eval", "accelerate", "datasets"),
    "serve": ("compressed_tensors", "peft"),
    "search": ("optuna", "matplotlib"),
    "ray": ("ray",),
    "report": ("vl_convert",),
}
"""Modules by the extra of pyproject.toml that installs them."""


def missing(extra: str) -> list[str]:
    """The libraries of an extra that are not installed."""
    return [name for name in LIBRARIES[extra] if find_spec(name) is None]


def require(what: str, *extras: str) -> None:
    """Raise a `UserError` naming the extras that are not installed.

    Args:
        what: what needs them, as its user knows it: "`trimtab run`", or "gguf files".
        extras: keys of `LIBRARIES`.
    """
    lacking = {extra: found for extra in extras if (found := missing(extra))}
    if lacking:
        libraries = ", ".join(dict.fromkeys(name for found in lacking.values() for name in found))
        raise UserError(f"{what} needs {libraries}, not installed here: pip install 'trimtab[{','.join(lacking)}]'")


def require_library(what: str, library: str) -> None:
    """Raise a `UserError` naming every extra that brings one library, if it is not installed: for what needs no other.

    Args:
        what: as of `require`.
        library: one of the modules of `LIBRARIES`.
    """
    if find_spec(library) is None:
        extras = [f"'trimtab[{extra}]'" for extra, libraries in LIBRARIES.items() if library in libraries]
        assert extras, library
        raise UserError(f"{what} needs {library}, not installed here: pip install {' or '.join(extras)}")
