"""What a model was read from: nothing is written over it, and an adapter may name it as its base."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from trimtab.errors import UserError
from trimtab.quant.grid import AnyGrid

_READ_FROM = "_trimtab_read_from"
_ROUNDED_FROM = "_trimtab_rounded_from"
_GRIDS = "_trimtab_grids"


def remember(model: nn.Module, path: Path) -> None:
    """Note what a model was read from, whatever the working directory is later."""
    setattr(model, _READ_FROM, str(path.resolve()))


def read_from(model: nn.Module) -> set[Path]:
    """What a model was read from, on this machine: as `load` noted it, and as transformers did."""
    named = [getattr(model, _READ_FROM, ""), getattr(model, "name_or_path", "")]
    return {Path(name).resolve() for name in named if name and Path(name).exists()}


def processor_files(model: nn.Module) -> list[Path]:
    """Settings of what makes tensors of images and sounds, beside what a model was read from: no training changes them."""
    return sorted(file for path in read_from(model) if path.is_dir() for file in path.glob("*processor_config.json"))


class Grids(NamedTuple):
    """The grids that a model's tensors have in the files that it is laid out for."""

    by_name: dict[str, AnyGrid]
    """By the tensors' names in the model."""
    kept: bool
    """Whether layers keep them without a rule that says so."""


def note_grids(model: nn.Module, by_name: dict[str, AnyGrid], kept: bool) -> None:
    """Note the grids of a model's files."""
    setattr(model, _GRIDS, Grids(by_name, kept))


def grids_of(model: nn.Module) -> Grids:
    """As `note_grids` noted them."""
    found: Grids = getattr(model, _GRIDS, Grids({}, kept=False))
    return found


def check_not_read_from(model: nn.Module, target: Path) -> None:
    """Raise a `UserError` if a model is to be written over what it was read from."""
    if any(target.resolve() in (path, *path.parents) for path in read_from(model)):
        raise UserError(f"{target}: the model was read from there; save it somewhere else, and remove that if you wish")


def note_rounded(model: nn.Module, name: str | None) -> None:
    """Note the float checkpoint of which rounding to nearest gives the stored weights; None if there is none such."""
    local = name is not None and Path(name).is_dir()
    setattr(model, _ROUNDED_FROM, str(Path(name).resolve()) if local and name is not None else name or None)


def rounded_from(model: nn.Module) -> str | None:
    """As `note_rounded` noted it: a directory or hub id."""
    found: str | None = getattr(model, _ROUNDED_FROM, None)
    return found
