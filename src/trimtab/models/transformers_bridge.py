"""The bridge to transformers: a quantizer of our own, so that `save_pretrained` and `from_pretrained` just work.

`config.json` holds, under `quantization_config`, one spec per distinct kind of layer and which layers have it. Before
weights are read every such layer is laid out on the meta device from its spec; the tensors in the file then have the
very names and shapes of the modules, so nothing is converted. Importing this module registers the quantizer;
`registration` sees to it that this happens before any model is read.

A process that never imported trimtab must not get random weights: without the quantizer, transformers would only warn
that every projection is missing and initialise them. So every state of our layers holds a marker of one byte under the name
of the weight that each replaced: a plain load finds its shape wrong and raises, whichever way the state was written.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trimtab.errors import UserError
from trimtab.kernels import tuning
from trimtab.layers import linear
from trimtab.layers.experts import QuantExperts
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.models import whole
from trimtab.models.buffers import guard, keep_with_state, not_remade
from trimtab.models.finite import require_finite
from trimtab.models.kv_cache import current, install
from trimtab.models.offloading import follow, refuse_other_parting
from trimtab.models.opening import leave_unmarked, open_layers
from trimtab.models.origin import remember
from trimtab.models.prepared import become_prepared, compute_dtype, mark, quant_layers
from trimtab.models.transposed import replace_by
from trimtab.quant import packing
from trimtab.quant.activations import KvCache
from trimtab.reading import told

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger("trimtab")

QUANT_METHOD = "trimtab"
FORMAT_VERSION = 3
"""Newest version of the native format: raised when a stored file would read differently. A file has the oldest version that
reads it right: 3 if it holds buffers that an older reader would recompute, 2 if inputs or the KV cache are rounded, which a
reader of version 1 would leave out, else 1."""


@register_quantization_config(QUANT_METHOD)
class TrimtabConfig(QuantizationConfigMixin):
    """The `quantization_config` of a native model.

    Args:
        format_version: see `FORMAT_VERSION`.
        layout: how codes are packed (`packing.LAYOUT`).
        compute_dtype: dtype the model computes in where the caller names none.
        specs: distinct layer specs.
        layers: layer name to index into `specs`.
        kv: how keys and values are rounded (`kv_cache`), or None.
        buffers: names of buffers in the file that would otherwise be made again (`buffers`).
    """

    def __init__(
        self,
        format_version: int = 1,
        layout: str = packing.LAYOUT,
        compute_dtype: str = "bfloat16",
        specs: list[dict[str, Any]] | None = None,
        layers: dict[str, int] | None = None,
        kv: dict[str, Any] | None = None,
        buffers: list[str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.format_version, self.layout, self.compute_dtype = format_version, layout, compute_dtype
        self.specs, self.layers, self.kv = specs or [], layers or {}, kv
        if buffers:
            self.buffers = buffers

    def check(self) -> None:
        """Raise a `UserError` for what none of ours could hold: it comes with a model, from anywhere."""
        kinds = {"format_version": int, "layout": str, "compute_dtype": str, "specs": list, "layers": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(getattr(self, key), kind)]
        wrong += ["specs"] if not wrong and not all(isinstance(spec, dict) for spec in self.specs) else []
        if not wrong and not all(i in range(len(self.specs)) for i in self.layers.values() if not isinstance(i, bool)):
            wrong = ["layers"]
        wrong += [] if isinstance(self.kv, dict | None) else ["kv"]
        wrong += [] if isinstance(getattr(torch, str(self.compute_dtype), None), torch.dtype) else ["compute_dtype"]
        buffers = getattr(self, "buffers", [])
        wrong += [] if isinstance(buffers, list) and all(isinstance(b, str) for b in buffers) else ["buffers"]
        if wrong:
            raise UserError(f"quantization_config.{wrong[0]}: not as trimtab writes it; save or fetch the model again")

    @property
    def get_apply_tensor_subclass(self) -> Any:
        """Asked by peft before it wraps the first layer of a model (`SFTTrainer(peft_config=...)`, `get_peft_model`).

        Raises:
            UserError: always. Around our layers it has no adapters, and ours it would freeze.
        """
        raise UserError(
            "peft_config: this model's layers are trimtab's, which peft cannot wrap, and its adapters, if it has a method, "
            "are in it already: leave peft_config out. For another adapter prepare it with another method, for example "
            "trimtab.prepare(model, trimtab.methods.Qlora(rank=16))"
        )

    @classmethod
    def of(cls, model: "PreTrainedModel", compute_dtype: torch.dtype, buffers: Sequence[str] = ()) -> "TrimtabConfig":
        """The config that describes a model as it is now."""
        specs: dict[str, int] = {}
        layers = {}
        for name, layer in quant_layers(model).items():
            layers[name] = specs.setdefault(json.dumps(layer.spec(), sort_keys=True), len(specs))
        dtype = str(compute_dtype).removeprefix("torch.")
        found, kv = [json.loads(s) for s in specs], current(model)
        version = 3 if buffers else 2 if kv is not None or any("inputs" in spec for spec in found) else 1
        rounded = None if kv is None else asdict(kv)
        return cls(version, compute_dtype=dtype, specs=found, layers=layers, kv=rounded, buffers=list(buffers))


@register_quantizer(QUANT_METHOD)
class TrimtabQuantizer(HfQuantizer):
    """Lays out our layers before weights are read, and restores what transformers does not know of."""

    requires_calibration = True
    quantization_config: TrimtabConfig
    gathered: dict[str, Tensor] | None = None
    """The state that a model's shards were gathered into, while it is saved."""
    _compute_dtype: torch.dtype | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse files of a version or layout that this release does not read."""
        config = self.quantization_config
        config.check()
        if config.format_version > FORMAT_VERSION or config.layout != packing.LAYOUT:
            raise UserError(
                f"this model is in trimtab format {config.format_version}, layout {config.layout}; this release reads "
                f"formats up to {FORMAT_VERSION}, layout {packing.LAYOUT}: install a newer trimtab"
            )

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Keep every stored dtype; what is not ours is cast once all is loaded."""
        return None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the dtype to compute in."""
        self._compute_dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        for folder in dict.fromkeys(Path(file).parent for file in kwargs.get("checkpoint_files") or ()):
            whole.check(folder)
        refuse_other_parting(model.config)
        tuning.for_models()
        config = self.quantization_config
        dtype = kwargs.get("dtype") or self._compute_dtype or getattr(torch, config.compute_dtype)
        self._compute_dtype = dtype
        with told(lambda words: f"{_where(model)} does not describe its layers ({words}); save or fetch it again"):
            self._lay_out(model, dtype)
        untie(model)
        keep_with_state(model, getattr(config, "buffers", []))
        markers = (rf"^{re.escape(name)}\.weight$" for name in config.layers)
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *markers}

    def _lay_out(self, model: "PreTrainedModel", dtype: torch.dtype) -> None:
        """Put our layers in the places of those that they replaced."""
        config, tied_to = self.quantization_config, None
        open_layers(model, config.layers)
        # Embeddings come before their tied heads in every model we know, but nothing promises it.
        for name in sorted(config.layers, key=lambda n: "embedding" not in config.specs[config.layers[n]]):
            with torch.device("meta"):
                layer = linear.from_spec(config.specs[config.layers[name]], dtype, tied_to)
            _require_place(model, name, layer)
            replace_by(model, name, layer)
            tied_to = layer if isinstance(layer, QuantEmbedding) else tied_to
        set_reading(model, True)
        if config.kv is not None:  # transformers keeps the name of an attention out of config.json
            install(model, KvCache(**config.kv))

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        for name, p in model.named_parameters():
            # transformers marks what it has read; what it has not read it would have left uninitialised, with a warning.
            # What stays on the disk until it is used (`offload_folder`) was looked for there.
            if not p.is_meta and not getattr(p, "_is_hf_initialized", False):
                raise UserError(f"no tensor {name} in the model's safetensors; save or fetch it again")
        set_reading(model, False)
        cast_floats(model, self._compute_dtype or torch.bfloat16)
        for name, p in model.named_parameters():
            if not p.is_meta:
                require_finite(p.detach(), name)
        freeze(model)
        settle(model)
        follow(model)
        if model.name_or_path and Path(model.name_or_path).is_dir():
            remember(model, Path(model.name_or_path))
        return model

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes; brings the config up to date with the layers first."""
        dtype = compute_dtype(model)
        buffers = not_remade(model, dtype)
        for name, buffer in buffers.items():
            _log.warning(
                "%s: is not what %s is made with (a cast to %s?); saved as it is",
                name,
                type(model).__name__,
                buffer.dtype,
            )
        keep_with_state(model, list(buffers))
        attach(model, list(buffers))
        kept = getattr(self.quantization_config, "buffers", [])
        state = model.state_dict() if self.gathered is None else self.gathered
        if state:
            state = mark(model, {**state, **{name: model.get_buffer(name) for name in kept}})
        return state, {}  # version and layout are in config.json: of several keys safetensors draws the order at random

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Saved as it stands."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are ours, not peft's. A trainer asks while it is made: it is looked at when it begins."""
        from trimtab.models import trainer_watch  # which imports trainers, of which a model that only runs has none

        trainer_watch.install()
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainers that refuse purely quantized models take this one."""
        return True


def _where(model: "PreTrainedModel") -> str:
    return f"{Path(model.name_or_path or '.') / 'config.json'}: its quantization_config"


def _require_place(model: "PreTrainedModel", name: str, layer: QuantLinear | QuantEmbedding) -> None:
    """Raise a `UserError` if a layer of the config's specs is not of the shape that the rest of the config says."""
    weight = getattr(model.get_submodule(name), "weight", None)
    found, wanted = tuple(layer.base.shape), None if weight is None else tuple(weight.shape)
    if wanted is not None and wanted != found:
        raise UserError(
            f"{_where(model)} gives {name} the shape {found}, and the rest of config.json {wanted}; "
            "save or fetch the model again"
        )


def cast_floats(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Cast the float parameters outside our layers, as transformers would; buffers keep the dtype they were made in."""
    from trimtab.models.layout import kept_in  # which imports models, and those import quantizers, and so this file

    kept = kept_in(model, dtype)
    ours = {id(p) for layer in quant_layers(model).values() for p in layer.parameters()}
    for layer in quant_layers(model).values():
        if isinstance(layer, QuantEmbedding):
            layer.dtype = dtype
    for name, p in model.named_parameters():
        if p.is_floating_point() and id(p) not in ours:
            p.data = p.data.to(kept(name) or dtype)


def untie(model: "PreTrainedModel") -> None:
    """Forget tied parameters that no longer exist: a tied head now borrows its embedding's stored weight."""
    names = {f"{n}.weight" for n in quant_layers(model)}
    keys = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {k: v for k, v in keys.items() if k not in names and v not in names}
    # From these it is made again by what calls `tie_weights` (lm-evaluation-harness does).
    declared = model._tied_weights_keys or {}
    model._tied_weights_keys = {k: v for k, v in declared.items() if k not in names and v not in names}


def freeze(model: nn.Module) -> None:
    """Let exactly the adapters of our layers want gradients."""
    for p in model.parameters():
        p.requires_grad_(False)
    for layer in quant_layers(model).values():
        if isinstance(layer, QuantLinear) and layer.adapter is not None:
            for p in layer.adapter.parameters():
                p.requires_grad_(True)


def set_reading(model: nn.Module, reading: bool) -> None:
    """Tell every module of ours whether transformers is reading a file into it."""
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantEmbedding | QuantExperts):
            module.reading = reading


def settle(model: nn.Module) -> None:
    """What holds for a model of ours from now on: its class answers for it, buffers outlive casts, layers have names."""
    become_prepared(model)
    guard(model)
    leave_unmarked(model)
    whole: Any = model
    head = whole.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, layer in quant_layers(model).items():
        layer.name = name
        if layer is head and isinstance(layer, QuantLinear):
            layer.head_dtype = compute_dtype(model)


def attach(model: "PreTrainedModel", buffers: Sequence[str] = ()) -> None:
    """Make transformers see the model for what it is now: quantized by us, trainable, and savable.

    `buffers` are names of those that are saved from now on, although they would be made again.
    """
    if not quant_layers(model):
        return
    settle(model)
    old = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    config = TrimtabConfig.of(model, compute_dtype(model), [*getattr(old, "buffers", []), *buffers])
    model.config.quantization_config = config
    quantizer = getattr(model, "hf_quantizer", None) or TrimtabQuantizer(config, pre_quantized=True)
    quantizer.quantization_config = config
    for name, value in (("hf_quantizer", quantizer), ("is_quantized", True), ("quantization_method", QUANT_METHOD)):
        setattr(model, name, value)


__all__ = [
    "FORMAT_VERSION", "QUANT_METHOD", "TrimtabConfig", "TrimtabQuantizer", "attach", "cast_floats", "compute_dtype",
    "freeze", "quant_layers", "settle", "untie",
]  # fmt: skip
