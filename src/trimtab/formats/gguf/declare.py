"""GGUF as a format: which grids its types hold, and where a model's source file is found again.

The forms are asked of `blocks.block_type`, grid by grid, so that what is declared is what is written. gguf itself is
only imported when a file is.
"""

import logging
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.formats.declaration import ALL_KINDS, DENSE, Engine, Form, Format, Writing
from trimtab.formats.gguf.blocks import BLOCK, POWERS, SUPER_TYPES, TYPES, block_type
from trimtab.models.architecture import sees_or_hears
from trimtab.models.sources import resolve
from trimtab.quant.grid import Grid, Zero, k_quant
from trimtab.recipe import recipe

_log = logging.getLogger("trimtab")

FILE = "model.gguf"
"""The one file of an export."""

_ZEROS: tuple[Zero, ...] = ("symmetric", "integer", "real")


def _type_of(bits: int, zero: Zero) -> str | None:
    try:
        return block_type(Grid(bits, BLOCK, zero)).name
    except UserError:
        return None


def _forms() -> tuple[Form, ...]:
    """A form for each type and zero."""
    found = []
    for name in TYPES:
        for zero in _ZEROS:
            bits = tuple(b for b in range(1, 9) if _type_of(b, zero) == name)
            if bits:
                found.append(
                    Form(
                        name=name,
                        width=TYPES[name].bits,
                        bits=bits,
                        zeros=(zero,),
                        kinds=ALL_KINDS,
                        group_of=BLOCK,
                        scales="float16",
                    )
                )
    for kind in SUPER_TYPES.values():
        grid = k_quant(kind.name.lower())
        found.append(
            Form(
                name=kind.name,
                width=kind.bits,
                bits=(kind.bits,),
                zeros=(grid.zero,),
                kinds=ALL_KINDS,
                group_of=grid.group or 1,
                scales=grid.scale_dtype,
            )
        )
    found.append(Form(name=POWERS.name, bits=(), zeros=(), kinds=ALL_KINDS, table="mxfp4"))
    return tuple(found)


class Gguf(Format):
    """One file for llama.cpp."""

    name = "gguf"
    whole = False
    library = "gguf"
    summary = "one file of blocks of 32 or k-quants, for llama.cpp; a tuned GGUF file keeps all that was not tuned"
    forms = _forms()
    experts = ("alone", "stack")
    transposed = True
    engines = (Engine(name="llama.cpp", bits=tuple(range(1, 9)), zeros=_ZEROS, tables=("mxfp4",)),)

    def require_config(self, config: Any, engine: str | None = None) -> None:
        """Raise a `UserError` for a model that llama.cpp would compute otherwise."""
        from trimtab.formats.gguf.families import metadata

        text = config.get_text_config()
        metadata(text, text.vocab_size)

    def write(self, folder: Path, writing: Writing) -> None:
        """Write `model.gguf`, from the GGUF file that the model came from if there is one."""
        from trimtab.formats.gguf.write import save

        saved = writing.source / "recipe.yaml"
        name = recipe.read(saved).name if saved.is_file() else writing.source.name
        dense = {layer for layer, form in writing.forms.items() if form is DENSE}
        source = came_from(writing.source)
        if sees_or_hears(writing.model):
            _log.warning(
                "export: gguf: of a %s the language model alone; llama.cpp has all else from the projector file (mmproj) "
                "of its base, which stays as it is",
                type(writing.model).__name__,
            )
        save(folder / FILE, writing.model, writing.tokenizer, name=name, source=source, dense=dense)


def came_from(folder: Path) -> Path | None:
    """The GGUF file that a saved model was made from, over any number of runs; None if it came from none.

    Raises:
        UserError: if that file is no longer there.
    """
    seen = set()
    while folder not in seen and (folder / "recipe.yaml").is_file():
        seen.add(folder)
        path = recipe.read(folder / "recipe.yaml").model.path
        if path.endswith(".gguf"):
            file = Path(path).expanduser()
            if not file.is_file():
                raise UserError(
                    f"export: gguf: {path}, which the model was made from, is gone: its tokenizer and all tensors that "
                    "were not tuned are copied from there; put it back"
                )
            return file
        local = Path(path).expanduser()
        if not local.exists():  # a package's name, or a hub id, which is never a GGUF file
            found = resolve(path) if "/" not in path else None
            return found if found is not None and found.suffix == ".gguf" else None
        folder = local
    return None
