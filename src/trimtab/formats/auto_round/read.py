"""AutoRound's own format as a base, code for code: GPTQ's or AWQ's tensors under settings of AutoRound's.

    packing_format                       tensors
    auto_round:auto_awq                  AWQ's
    auto_round:auto_gptq                 GPTQ's first version: zeros less one
    auto_round, auto_round:gptqmodel     GPTQ's second: zeros as they are

`extra_config` gives layers widths and groups of their own, by name or by a regular expression. What AutoRound writes for
GPTQ's, AWQ's or compressed-tensors' readers says so in `quant_method`, and is read as theirs.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.formats.awq.read import AwqPacking
from trimtab.formats.gptq.read import GptqPacking
from trimtab.models.packed import PackedSource, Packing
from trimtab.models.sources import quantization_of


class _OwnLayers(Packing):
    """Settings of layers under `extra_config`."""

    def settings_of(self, layer: str) -> Mapping[str, Any]:
        """The model's, with the layer's own over them."""
        own = self.settings.get("extra_config") or {}
        by_pattern = (values for name, values in own.items() if _names(name, layer))
        return {**self.settings, **(own.get(layer) or next(by_pattern, {}))}


class AutoRoundGptq(_OwnLayers, GptqPacking):
    """GPTQ's tensors."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        less_one = "auto_gptq" in packing_of(settings)
        super().__init__({**settings, "checkpoint_format": "gptq" if less_one else "gptq_v2"})


class AutoRoundAwq(_OwnLayers, AwqPacking):
    """AWQ's tensors."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__({**settings, "version": "gemm"})


def packing_of(settings: Mapping[str, Any]) -> str:
    """`packing_format`; a `UserError` where it, or what is rounded beside weights, is not read."""
    packing = str(settings.get("packing_format", "auto_round:auto_gptq"))
    rounds = settings.get("data_type", "int") != "int" or int(settings.get("act_bits") or 16) < 16
    if rounds or not packing.startswith("auto_round") or packing.partition(":")[2] not in _PACKINGS:
        about = ", ".join(f"{key} {settings[key]}" for key in ("data_type", "act_bits") if key in settings)
        raise UserError(
            f"quantization_config: packing_format {packing}{f' ({about})' if about else ''}: AutoRound's integer weights "
            "in GPTQ's or AWQ's packing are read, with inputs in float"
        )
    return packing


_PACKINGS = ("", "auto_gptq", "gptqmodel", "auto_awq")


def _names(pattern: str, layer: str) -> bool:
    """Whether a key of `extra_config` that is not a layer's name is a regular expression that matches one."""
    try:
        return re.search(pattern, layer) is not None if set(pattern) & set("*^$|[\\") else False
    except re.error:
        return False


def opened(path: Path) -> PackedSource:
    """The source of a folder that says `quant_method: auto-round`."""
    try:
        awq = packing_of(quantization_of(path)).endswith("auto_awq")
    except UserError as error:
        raise UserError(f"model.path: {path}: {error}") from error
    return PackedSource(path, AutoRoundAwq if awq else AutoRoundGptq)
