"""Checkpoints whose layers another library has quantized: every layer is read as one weight on our grid, code for code.

    file                                        what the rest of the loader sees
    layers.0.q_proj.qweight, .qzeros, .scales   layers.0.q_proj.weight, of the shape and on the grid that they say
    layers.0.input_layernorm.weight             the same

A format's reader (`formats/<name>/read.py`) is a `Packing`: which tensors belong to a layer, what grid and shape follow
from their headers, and the weight that they are. Everything else (names, renames, ties, what is missing) is as for a float
checkpoint, since to transformers' conversions it is one.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.devices import CPU
from trimtab.errors import UserError
from trimtab.layers.weights import Weight
from trimtab.models.checkpoint import Checkpoint, Stored
from trimtab.models.origin import note_grids
from trimtab.models.sources import ModelSource, SafetensorsSource, quantization_of
from trimtab.quant.grid import AnyGrid, ScaleDtype
from trimtab.reading import told
from trimtab.words import and_more

_log = logging.getLogger("trimtab")

SCALE_DTYPES: dict[str, ScaleDtype] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
"""What scales are stored in, by safetensors' names."""


class Form(NamedTuple):
    """What headers say of a packed layer."""

    shape: tuple[int, int]
    """(N, K)."""
    grid: AnyGrid | None
    """None for a layer that is a float matrix once its scales are multiplied in."""


class Packing(ABC):
    """How a library stores a quantized layer.

    Args:
        settings: `quantization_config` of the model.

    Raises:
        UserError: for settings that this reader cannot keep code for code.
    """

    marker: str
    """Of the layer's tensors, one that no float layer has."""
    needed: tuple[str, ...] = ()
    """Others without which it means nothing, after the layer's name."""
    optional: tuple[str, ...] = ()
    """What it may have besides."""
    described: tuple[str, ...] = ()
    """Those of them that are small, and say more than their headers."""
    written_as: ClassVar[str | None] = None
    """The format of ours that writes it."""
    instead: ClassVar[str] = ModelSource.instead
    """What holds it, where none does."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def settings_of(self, layer: str) -> Mapping[str, Any]:
        """What holds for one layer: the model's settings, unless a library lets layers have their own."""
        return self.settings

    @abstractmethod
    def form(self, layer: str, headers: Mapping[str, Stored], small: Mapping[str, Tensor]) -> Form:
        """A layer's shape and grid.

        Args:
            layer: its name, for settings of its own.
            headers: dtypes and shapes of its tensors.
            small: those of `described`, read.

        Raises:
            UserError: what is wrong, without the layer's name.
        """

    @abstractmethod
    def weight(self, tensors: Mapping[str, Tensor], form: Form) -> Weight | Tensor:
        """The layer's weight: the file's codes, scales and zeros; float32 (N, K) where it has no grid.

        Raises:
            UserError: as `form`.
        """


def require_in_order(groups_K: Tensor | None, in_features: int, groups: int) -> None:
    """Refuse groups that follow the order of activations (act-order), in which no grid here holds them.

    Args:
        groups_K: the group of each input, if that is stored.
        in_features: K.
        groups: in a row.
    """
    if groups_K is not None and not torch.equal(groups_K.long(), torch.arange(in_features) // (in_features // groups)):
        raise UserError(
            "its groups follow the order of activations (act-order, desc_act), which no grid here holds; take a "
            "checkpoint without it"
        )


class PackedCheckpoint(Checkpoint):
    """A folder's tensors, those of each packed layer as one float matrix.

    Args:
        path: the folder.
        packing: how its layers are stored.

    Raises:
        UserError: naming the layer whose tensors do not fit together; as `Checkpoint`.
    """

    def __init__(self, path: Path, packing: Packing) -> None:
        super().__init__(path)
        self._packing = packing
        self._parts: dict[str, dict[str, Stored]] = {}
        self.forms: dict[str, Form] = {}
        """By the name that a float matrix would have."""
        end = f".{packing.marker}"
        for layer in [name.removesuffix(end) for name in self.tensors if name.endswith(end)]:
            whole = (packing.marker, *packing.needed, *packing.optional)
            parts = {part: self.tensors.pop(f"{layer}.{part}") for part in whole if f"{layer}.{part}" in self.tensors}
            for lacking in (part for part in packing.needed if part not in parts):
                raise UserError(
                    f"{path}: {layer}: has {packing.marker} but no {lacking}; the checkpoint is incomplete, fetch it again"
                )
            small = self.taken({part: (f"{layer}.{part}", parts[part]) for part in packing.described if part in parts})
            name = f"{layer}.weight"
            with self._about(layer):
                self.forms[name] = packing.form(layer, parts, small)
            self._parts[name] = parts
            self.tensors[name] = Stored(parts[packing.marker].file, "F32", self.forms[name].shape, packed=True)

    @contextmanager
    def _about(self, layer: str) -> Iterator[None]:
        """Say of which layer an error is, whatever its tensors are."""
        try:
            with told(lambda words: f"its tensors are not those of the format ({words}); fetch the checkpoint again"):
                yield
        except UserError as error:
            raise UserError(f"{self.path}: {layer}: {error}") from error

    def weight(self, name: str) -> Weight | Tensor | None:
        """What the packed tensors that stand for this one are; None where the file holds the tensor itself."""
        if name not in self._parts:
            return None
        layer = name.removesuffix(".weight")
        tensors = self.taken({part: (f"{layer}.{part}", stored) for part, stored in self._parts[name].items()})
        with self._about(layer):
            return self._packing.weight(tensors, self.forms[name])

    def mapped(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors; packed ones dequantized to float32."""
        names = list(names)
        found = super().mapped(name for name in names if name not in self._parts)
        for name in names:
            weight = self.weight(name)
            if weight is not None:
                found[name] = weight.dequantize(torch.float32) if isinstance(weight, Weight) else weight
        return found


class PackedSource(SafetensorsSource):
    """A folder whose layers another library has quantized.

    Args:
        path: the folder.
        packing: how its layers are stored.

    Raises:
        UserError: for settings or layers that are not read, by name.
    """

    floats = False

    def __init__(self, path: Path, packing: type[Packing]) -> None:
        try:
            with told(lambda words: f"its quantization_config cannot be understood ({words}); fetch it again"):
                how = packing(quantization_of(path))
        except UserError as error:
            raise UserError(f"model.path: {path}: {error}") from error
        super().__init__(path, checkpoint := PackedCheckpoint(path, how))
        self.by = str(how.settings.get("quant_method", "mlx"))
        if not checkpoint.forms:
            raise UserError(
                f"{path}: its quantization_config says {self.by}, and no layer in its files is stored so; take the "
                "config.json that was saved with the weights"
            )
        self.came_in, self.instead = packing.written_as, packing.instead
        floats = [name.removesuffix(".weight") for name, form in checkpoint.forms.items() if form.grid is None]
        if floats:
            _log.warning(
                "%s: %s: no grid here holds their values, so they are dequantized once", path, and_more(floats)
            )
        self._packed = checkpoint
        self._laid_out: ref[PreTrainedModel] | None = None

    def config(self) -> Any:
        """Of the model that was quantized."""
        config = super().config()
        for key in ("quantization_config", "quantization"):  # the second is MLX's
            vars(config).pop(key, None)
        return config

    def layout(self, **options: Any) -> PreTrainedModel:
        """The float model on the meta device, with a note of the grid that each of its tensors has in the file."""
        model = super().layout(**options)
        self.bind(model)
        self._laid_out = ref(model)
        forms = {name: self._packed.forms.get(self._source_of(name)) for name in model.state_dict()}
        grids = {name: form.grid for name, form in forms.items() if form is not None and form.grid is not None}
        note_grids(model, grids, kept=bool(grids))
        return model

    def bind(self, model: PreTrainedModel) -> None:
        """As of any safetensors; of the model that was laid out here that is done."""
        if self._laid_out is None or self._laid_out() is not model:
            super().bind(model)

    def _source_of(self, name: str) -> str:
        """The checkpoint's name of a tensor of the model that stands there as it is; "" for any other."""
        assert self._conversion is not None, "bind the source to a model first"
        return self._conversion.source_of(name) or ""

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device = CPU) -> Tensor | Weight:
        """The codes that stand in the file; of what is made of several tensors, and of floats, the numbers."""
        weight = self._packed.weight(self._source_of(name))
        return super().read(name, dtype, device) if weight is None else weight.to(device)
