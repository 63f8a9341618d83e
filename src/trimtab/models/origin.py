"""What a model was read from, so that nothing is written over it."""

from pathlib import Path

from torch import nn

_READ_FROM = "_trimtab_read_from"


def remember(model: nn.Module, path: Path) -> None:
    """Note what a model was read from, whatever the working directory is later."""
    setattr(model, _READ_FROM, str(path.resolve()))


def read_from(model: nn.Module) -> set[Path]:
    """What a model was read from, on this machine: as `load` noted it, and as transformers did."""
    named = [getattr(model, _READ_FROM, ""), getattr(model, "name_or_path", "")]
    return {Path(name).resolve() for name in named if name and Path(name).exists()}
