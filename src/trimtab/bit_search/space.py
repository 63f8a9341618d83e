"""What a search chooses from: units of a model, and widths (and ranks) for each.

A unit is a set of layers that share a grid: a whole decoder layer, or a *fusion group* inside one (q, k and v; o; gate and
up; down), since serving engines run the layers of a group as one matrix and need one scheme for it. A configuration is a
choice for every unit, and stands for ordinary `rules`: nothing downstream knows of a search.

Bytes are those of `file_size`: additive, never measured, never less than the file's. Of another format than ours they are
those of `export_size`: its tensors to the byte, without what the file says of them.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from trimtab.bit_search.additive import Configuration
from trimtab.errors import UserError
from trimtab.formats import get
from trimtab.formats.declaration import Format
from trimtab.formats.export_size import export_sizes, layer_size
from trimtab.formats.file_size import Entry, file_size
from trimtab.methods.base import Method
from trimtab.models.architecture import architecture_of
from trimtab.models.decoder import block_names
from trimtab.models.targets import Target, placed_targets
from trimtab.models.transformers_bridge import cast_floats
from trimtab.quant.activations import Activations
from trimtab.quant.grid import AnyGrid, of_width
from trimtab.recipe.rules import Placement, Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

By = Literal["layer", "fusion"]
FLOAT = 16
"""The choice that keeps a unit in 16 bits."""


@dataclass(frozen=True)
class Unit:
    """Layers that share a choice."""

    name: str
    """For example `model.layers.3` or `model.layers.3.qkv`."""
    layers: tuple[str, ...]
    """Module names."""


@dataclass(frozen=True)
class Space:
    """Units, choices, and the bytes of each."""

    units: tuple[Unit, ...]
    bits: tuple[int, ...]
    """Width of each choice; 16 keeps a unit in float."""
    ranks: tuple[int | None, ...]
    """Rank of each choice's adapters; None is the method's."""
    placements: tuple[Placement, ...]
    """What each choice gives a layer."""
    others: tuple[Rule, ...]
    """Rules for what is not searched over (embeddings, head)."""
    bytes_UC: np.ndarray
    """int64 (units, choices): stored bytes, bound and additive."""
    fixed_bytes: int
    """Of everything else."""

    def rules(self, configuration: Configuration) -> list[Rule]:
        """The rules of a configuration."""
        searched = [
            Rule(name, self.placements[choice], self.ranks[choice])
            for unit, choice in zip(self.units, configuration, strict=True)
            for name in unit.layers
        ]
        return [*searched, *self.others]

    def label(self, choice: int) -> str:
        """For people: `4`, or `4r16` with a rank."""
        rank = self.ranks[choice]
        return f"{self.bits[choice]}" + ("" if rank is None else f"r{rank}")

    def bytes(self, configuration: Configuration) -> int:
        """At least the bytes of the model's safetensors under these rules, and additive over units."""
        return self.fixed_bytes + int(self.bytes_UC[np.arange(len(self.units)), list(configuration)].sum())


def units(model: "PreTrainedModel", by: By, others: Sequence[Rule] = ()) -> tuple[Unit, ...]:
    """The units of a model's decoder layers, in its order, without layers that a rule keeps untouched (`grid: null`)."""
    family, found = architecture_of(model), dict[str, list[str]]()
    # Models that keep their blocks under another name have not been searched.
    blocks = block_names(model) if (family.blocks or "").rpartition(".")[2] == "layers" else []
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            rule = next((r for r in others if fnmatchcase(name, r.match)), None)
            if not isinstance(module, torch.nn.Linear) or (rule is not None and rule.grid is None):
                continue
            found.setdefault(block if by == "layer" else f"{block}.{family.fusion(name)[0]}", []).append(name)
    if not found:
        raise UserError("search: the model has no float decoder layers under `layers`; start from a float model")
    return tuple(Unit(name, tuple(layers)) for name, layers in found.items())


def space(
    model: "PreTrainedModel",
    method: Method,
    *,
    bits: Sequence[int],
    grid: AnyGrid,
    ranks: Sequence[int] | None = None,
    by: By = "fusion",
    others: Sequence[Rule] = (),
    dtype: torch.dtype = torch.bfloat16,
    merge: bool = False,
    activations: Activations | None = None,
    size_of: str = "native",
) -> Space:
    """Lay out a space.

    Args:
        model: laid out on the meta device; left as it is, but for its floats' dtype.
        method: what will train it.
        bits: widths to choose from, 1 to 8, or 16 for float.
        grid: gives every choice its group, zero and scale dtype (or, a codebook of another size).
        ranks: to choose from, too; None leaves the method's.
        by: what a unit is.
        others: rules for what is not searched over.
        dtype: compute dtype.
        merge: see `file_size`.
        activations: see `file_size`.
        size_of: the format whose bytes count; of another than native, those of the tensors (see `export_size`).

    Raises:
        UserError: naming what is no choice here, or a layer that the format does not hold on one.
    """
    if len(set(bits)) != len(bits) or not bits:
        raise UserError(f"search: bits {list(bits)} are not different widths; write for example [2, 3, 4, 8]")
    if ranks is not None and not hasattr(method, "rank"):
        raise UserError(f"search: {method.name} has no rank to search over; leave out `ranks`")
    found, rules = units(model, by, others), list(others)
    placed = {b: _placement(method, grid, b) for b in sorted(bits)}
    # What is left untouched has no rank.
    pairs = tuple((b, r) for b in placed for r in (sorted(ranks) if ranks and placed[b] is not None else (None,)))
    placements = tuple(placed[b] for b, _ in pairs)
    cast_floats(model, dtype)
    names = [name for unit in found for name in unit.layers]

    def every(choice: int) -> list[Rule]:
        return [*(Rule(n, placements[choice], pairs[choice][1]) for n in names), *rules]

    how = _How(method, dtype, merge, activations, get(size_of))
    tables = [_parts(model, every(c), names, how) for c in range(len(pairs))]
    bytes_UC = np.array([[sum(table[n] for n in unit.layers) for table in tables] for unit in found], np.int64)
    return Space(
        units=found,
        bits=tuple(b for b, _ in pairs),
        ranks=tuple(r for _, r in pairs),
        placements=placements,
        others=tuple(rules),
        bytes_UC=bytes_UC,
        fixed_bytes=_fixed(model, every(0), names, how),
    )


def _placement(method: Method, grid: AnyGrid, bits: int) -> Placement:
    if bits == FLOAT:
        return _float(method)
    try:
        return of_width(grid, bits)
    except UserError as error:
        raise UserError(f"search.bits: {error}") from None


def _float(method: Method) -> Placement:
    """What 16 bits mean to a method: a float weight under its adapter, or an untouched layer where it has none for that."""
    try:
        return "float" if method.delta(None, (1024, 1024)) is not None else None
    except UserError:
        return None


class _How(NamedTuple):
    """What decides bytes beside names, shapes and rules."""

    method: Method
    dtype: torch.dtype
    merge: bool
    activations: Activations | None
    format: Format

    @property
    def stored(self) -> dict[str, Any]:
        """What decides bytes of any format, by name."""
        return {"dtype": self.dtype, "merge": self.merge, "activations": self.activations}


def _parts(model: "PreTrainedModel", rules: Sequence[Rule], names: Sequence[str], how: _How) -> dict[str, int]:
    """Bytes of each of these layers under these rules."""
    placed: dict[str, Target] = {t.name: t for t in placed_targets(model, how.method, rules)}
    found = {}
    for name in names:
        parameters = dict(model.get_submodule(name).named_parameters(prefix=name))
        if name not in placed:
            entries = [Entry(n, p.dtype, tuple(p.shape)) for n, p in parameters.items()]
            found[name] = sum(e.bound if how.format.everything else e.nbytes for e in entries)
            continue
        try:
            found[name] = layer_size(how.format, placed[name], how.method, **how.stored)
        except UserError as error:
            raise UserError(f"search.budget_of: {how.format.name}: {error}") from error
        if not how.format.everything:
            found[name] += sum(p.nbytes for n, p in parameters.items() if n.endswith(".bias"))
    return found


def _fixed(model: "PreTrainedModel", rules: Sequence[Rule], names: Sequence[str], how: _How) -> int:
    """Bytes of all but these layers."""
    if how.format.everything:
        whole = file_size(copy.deepcopy(model), how.method, rules, **how.stored).bound
    else:
        targets, only = placed_targets(model, how.method, rules), [how.format.name]
        size = export_sizes(model, targets, how.method, only=only, **how.stored)[how.format.name]
        if isinstance(size, str):
            raise UserError(f"search.budget_of: {how.format.name}: {size}")
        whole = size
    return whole - sum(_parts(model, rules, names, how).values())
