"""What a model was read from: nothing is written over it, and an adapter may name it as its base."""

from pathlib import Path

from torch import nn

_READ_FROM = "_trimtab_read_from"
_ROUNDED_FROM = "_trimtab_rounded_from"


def remember(model: nn.Module, path: Path) -> None:
    """Note what a model was read from, whatever the working directory is later."""
    setattr(model, _READ_FROM, str(path.resolve()))


def read_from(model: nn.Module) -> set[Path]:
    """What a model was read from, on this machine: as `load` noted it, and as transformers did."""
    named = [getattr(model, _READ_FROM, ""), getattr(model, "name_or_path", "")]
    return {Path(name).resolve() for name in named if name and Path(name).exists()}


def note_rounded(model: nn.Module, name: str | None) -> None:
    """Note the float checkpoint of which rounding to nearest gives the stored weights; None if there is none such."""
    local = name is not None and Path(name).is_dir()
    setattr(model, _ROUNDED_FROM, str(Path(name).resolve()) if local and name is not None else name or None)


def rounded_from(model: nn.Module) -> str | None:
    """As `note_rounded` noted it: a directory or hub id."""
    found: str | None = getattr(model, _ROUNDED_FROM, None)
    return found
