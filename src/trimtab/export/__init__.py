"""Formats that engines load, one file each, found by name; each is written from the stored codes.

native  compressed-tensors  gptq  gguf  mlx  dense  peft
"""

from trimtab.errors import UserError, nearest
from trimtab.export.compressed_tensors import CompressedTensors
from trimtab.export.declaration import Format
from trimtab.export.dense import Dense
from trimtab.export.gguf_format import Gguf
from trimtab.export.gptq import Gptq
from trimtab.export.mlx import Mlx
from trimtab.export.native import Native
from trimtab.export.peft_lora import PeftLora

ALL: tuple[Format, ...] = (Native(), CompressedTensors(), Gptq(), Gguf(), Mlx(), Dense(), PeftLora())
"""Every format, in the order of the tables."""


def get(name: str) -> Format:
    """The format of this name; a `UserError` with the nearest name if there is none."""
    known = {format_.name: format_ for format_ in ALL}
    if name not in known:
        raise UserError(f"export: no format {name!r}{nearest(name, list(known))}; see `trimtab formats`")
    return known[name]


__all__ = ["ALL", "Format", "get"]
