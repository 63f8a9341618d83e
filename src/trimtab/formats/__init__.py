"""Formats that engines load, one file each, found by name; each is written from the stored codes.

native  compressed-tensors  gptq  awq  gguf  mlx  dense  peft
"""

from trimtab.errors import UserError, nearest
from trimtab.extras import require_library
from trimtab.formats.awq.write import Awq
from trimtab.formats.compressed_tensors.write import CompressedTensors
from trimtab.formats.declaration import Format
from trimtab.formats.dense.write import Dense
from trimtab.formats.gguf.declare import Gguf
from trimtab.formats.gptq.write import Gptq
from trimtab.formats.mlx.write import Mlx
from trimtab.formats.native.write import Native
from trimtab.formats.peft.write import PeftLora

ALL: tuple[Format, ...] = (Native(), CompressedTensors(), Gptq(), Awq(), Gguf(), Mlx(), Dense(), PeftLora())
"""Every format, in the order of the tables."""


def get(name: str) -> Format:
    """The format of this name; a `UserError` with the nearest name if there is none."""
    known = {format_.name: format_ for format_ in ALL}
    if name not in known:
        raise UserError(f"export: no format {name!r}{nearest(name, list(known))}; see `trimtab formats`")
    return known[name]


def writer(name: str) -> Format:
    """The format of this name, as something to write with: a `UserError` if the library of its writer is not installed."""
    format_ = get(name)
    if format_.library is not None:
        require_library(f"export: {name}", format_.library)
    return format_


__all__ = ["ALL", "Format", "get", "writer"]
