"""The safetensors of a folder, by the names that stand in them: which files count, and what each tensor is.

transformers reads the file that config.json names, else `model.safetensors`, else all files that the index names; whatever
else lies in the folder is not the model's. Where it would find nothing, all files are taken together, if no tensor stands
in two of them. Only headers are read here; a tensor is mapped when it is asked for.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.errors import UserError
from trimtab.reading import read_mapping, require_regular

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    kind: str
    """safetensors' name of its dtype."""
    shape: tuple[int, ...]
    packed: bool = False
    """Whether it stands for codes, which lie along the input dimension where a family keeps floats as (K, N), too."""

    @property
    def dtype(self) -> torch.dtype | None:
        """torch's dtype; None for kinds that only quantized or damaged models have."""
        return _FLOATS.get(self.kind, _OTHERS.get(self.kind))

    @property
    def is_float(self) -> bool:
        """Whether it holds numbers as they are: fp8 and integers mean something only with a scale."""
        return self.kind in _FLOATS


class Checkpoint:
    """All tensors of a folder.

    Args:
        path: the folder, with its config.json.

    Raises:
        UserError: naming the file that is missing, truncated, pickled or elsewhere, or the tensor that stands in two.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Stored] = {}
        files, listed = files_of(path)
        for file in files:
            for name, stored in _header(file):
                if name in self.tensors:
                    raise UserError(
                        f"{path}: tensor {name} stands in {self.tensors[name].file.name} and in {file.name}; "
                        "take the file that is not the model's out of the folder"
                    )
                self.tensors[name] = stored
        for name, file in listed.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise UserError(f"{path}: tensor {name} should be in {file.name}, which is missing it; fetch it again")

    def mapped(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, as they lie in their files: to be copied before anything else happens to the files."""
        return self.taken({name: (name, self.tensors[name]) for name in names})

    @staticmethod
    def taken(wanted: Mapping[str, tuple[str, Stored]]) -> dict[str, Tensor]:
        """Tensors by any names, of their names in the files and of where they are; as `mapped`."""
        found: dict[str, Tensor] = {}
        opened: dict[Path, Any] = {}
        for called, (name, stored) in wanted.items():
            if stored.file not in opened:
                opened[stored.file] = _open(stored.file)
            found[called] = opened[stored.file].get_tensor(name)
        return found


def files_of(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files of a folder that are read, and which tensors are said to be in which."""
    named = _named(path)
    if named is None and (path / _WHOLE).is_file():
        named = _WHOLE
    if named is None and (path / _INDEX).is_file():
        named = _INDEX
    if named is not None:
        file = _inside(path, named, "config.json")
        if not named.endswith(".json"):
            return [file], {}
        listed = _listed(file)
        return sorted(set(listed.values())), listed
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = [f.name for f in sorted(path.iterdir()) if f.suffix in (".bin", ".pt", ".pth")]
        if pickled:
            raise UserError(
                f"{path}: only pickled weights ({pickled[0]}), which can run code when read; "
                "convert them with transformers' `save_pretrained`, which writes safetensors"
            )
        raise UserError(f"{path}: holds no .safetensors file; fetch or save it again")
    return files, {}


def _named(path: Path) -> str | None:
    """The file that config.json says the weights are in, as transformers lets it."""
    try:
        named = read_mapping(path / "config.json").get("transformers_weights")
    except UserError:  # the config's reader says what is wrong with it
        return None
    return None if named is None else str(named)


def _listed(index: Path) -> dict[str, Path]:
    """Which tensor an index says is in which file."""
    listed = read_mapping(index, "fetch it again").get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(
            f"{index}: not an index of safetensors (its weight_map does not say of any tensor which file it is in); "
            "fetch it again"
        )
    return {name: _inside(index.parent, file, index.name) for name, file in listed.items()}


def _inside(path: Path, name: str, said_by: str) -> Path:
    """A file of the folder by its name, which somebody else wrote; where a link leads is the owner's choice."""
    for kind in (PurePosixPath, PureWindowsPath):
        given = kind(name)
        if given.is_absolute() or given.drive or ".." in given.parts:
            raise UserError(f"{path}: {said_by} names {name}, which is outside the folder; fetch the model again")
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"{path}: {said_by} names {name}, which is not a safetensors file; fetch the model again")
    return path / name


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or not a safetensors file ({error}); fetch it again") from error


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    require_regular(file)
    if not file.exists():  # what should be in it is named by its caller
        return
    opened = _open(file)
    names = opened.keys()
    for name in names:
        part = opened.get_slice(name)
        yield name, Stored(file, part.get_dtype(), tuple(part.get_shape()))
