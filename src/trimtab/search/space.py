"""What a search chooses from: units of a model, and widths for each.

A unit is a set of layers that share a grid: a whole decoder layer, or a *fusion group* inside one (q, k and v; o; gate and
up; down), since serving engines run the layers of a group as one matrix and need one scheme for it. A configuration is a
choice for every unit, and stands for ordinary `rules`: nothing downstream knows of a search.

Bytes are those of `storage`: additive, never measured, never less than the file's.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from trimtab import hf, storage
from trimtab.errors import UserError
from trimtab.grid import Grid
from trimtab.methods.base import Method
from trimtab.preparing import Target, targets
from trimtab.rules import Placement, Rule
from trimtab.search.additive import Configuration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

By = Literal["layer", "fusion"]
FLOAT = 16
"""The choice that keeps a unit in 16 bits."""
_FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


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
    """Choices; 16 keeps a unit in float."""
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
            Rule(name, self.placements[choice])
            for unit, choice in zip(self.units, configuration, strict=True)
            for name in unit.layers
        ]
        return [*searched, *self.others]

    def bytes(self, configuration: Configuration) -> int:
        """At least the bytes of the model's safetensors under these rules, and additive over units."""
        return self.fixed_bytes + int(self.bytes_UC[np.arange(len(self.units)), list(configuration)].sum())


def units(model: "PreTrainedModel", by: By) -> tuple[Unit, ...]:
    """The units of a model's decoder layers, in its order."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        head, dot, rest = name.partition(".layers.")
        if not dot or not isinstance(module, torch.nn.Linear):
            continue
        layer, last = f"{head}.layers.{rest.split('.')[0]}", name.rpartition(".")[2]
        key = layer if by == "layer" else f"{layer}.{_FUSED.get(last, last.removesuffix('_proj'))}"
        found.setdefault(key, []).append(name)
    if not found:
        raise UserError("search: the model has no float decoder layers under `layers`; start from a float model")
    return tuple(Unit(name, tuple(layers)) for name, layers in found.items())


def space(
    model: "PreTrainedModel",
    method: Method,
    *,
    bits: Sequence[int],
    grid: Grid,
    by: By = "fusion",
    others: Sequence[Rule] = (),
    dtype: torch.dtype = torch.bfloat16,
    merge: bool = False,
) -> Space:
    """Lay out a space.

    Args:
        model: laid out on the meta device; left as it is, but for its floats' dtype.
        method: what will train it.
        bits: widths to choose from, 1 to 8, or 16 for float.
        grid: gives every choice its group, zero and scale dtype.
        by: what a unit is.
        others: rules for what is not searched over.
        dtype: compute dtype.
        merge: see `storage.stored`.
    """
    if len(set(bits)) != len(bits) or not bits:
        raise UserError(f"search: bits {list(bits)} are not different widths; write for example [2, 3, 4, 8]")
    found, rules = units(model, by), list(others)
    placements = tuple(_float(method) if b == FLOAT else replace(grid, bits=b) for b in sorted(bits))
    hf.cast_floats(model, dtype)
    names = [name for unit in found for name in unit.layers]
    tables = [_parts(model, method, [*(Rule(n, p) for n in names), *rules], names, dtype, merge) for p in placements]
    bytes_UC = np.array([[sum(table[n] for n in unit.layers) for table in tables] for unit in found], np.int64)
    fixed = _fixed(model, method, [*(Rule(n, placements[0]) for n in names), *rules], names, dtype, merge)
    return Space(found, tuple(sorted(bits)), placements, tuple(rules), bytes_UC, fixed)


def _float(method: Method) -> Placement:
    """What 16 bits mean to a method: a float weight under its adapter, or an untouched layer where it has none for that."""
    try:
        return "float" if method.delta(None, (1024, 1024)) is not None else None
    except UserError:
        return None


def _parts(
    model: "PreTrainedModel",
    method: Method,
    rules: Sequence[Rule],
    names: Sequence[str],
    dtype: torch.dtype,
    merge: bool,
) -> dict[str, int]:
    """Bytes of each of these layers under these rules."""
    placed: dict[str, Target] = {t.name: t for t in targets(model, method, rules)}
    found = {}
    for name in names:
        if name in placed:
            found[name] = storage.layer_bytes(placed[name], method, dtype=dtype, merge=merge)
        else:
            parameters = model.get_submodule(name).named_parameters(prefix=name)
            found[name] = sum(storage.Entry(n, p.dtype, tuple(p.shape)).bound for n, p in parameters)
    return found


def _fixed(
    model: "PreTrainedModel",
    method: Method,
    rules: Sequence[Rule],
    names: Sequence[str],
    dtype: torch.dtype,
    merge: bool,
) -> int:
    """Bytes of all but these layers."""
    whole = storage.stored(copy.deepcopy(model), method, rules, dtype=dtype, merge=merge).bound
    return whole - sum(_parts(model, method, rules, names, dtype, merge).values())
