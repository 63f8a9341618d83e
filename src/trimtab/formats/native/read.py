"""A directory that trimtab saved, as a source like any other: its layers are laid out from their specs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.devices import CPU
from trimtab.models import believable
from trimtab.models.layout import layout, put
from trimtab.models.sources import ModelSource, SafetensorsSource, read_config, read_tokenizer
from trimtab.models.transformers_bridge import TrimtabConfig, TrimtabQuantizer


class NativeSource(ModelSource):
    """One of our own directories.

    Args:
        path: the directory.

    Raises:
        UserError: if its safetensors are missing, truncated or incomplete.
    """

    prepared, came_in = True, "native"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored = SafetensorsSource(path)

    def config(self) -> Any:
        """The model's config, which says of every layer how it is stored."""
        return read_config(self.path)

    def tokenizer(self) -> Any:
        """The tokenizer saved with the model, or None."""
        return read_tokenizer(self.path) if (self.path / "tokenizer_config.json").exists() else None

    def layout(self, **options: Any) -> PreTrainedModel:
        """The model with our layers, laid out on the meta device, and on it the buffers that are stored, not made, too."""
        config = self.config()
        believable.require_tensors(self.path, config, self.count())
        quantized = config.quantization_config
        del config.quantization_config
        model = layout(str(self.path), config, **options)
        quantizer = TrimtabQuantizer(TrimtabConfig(**{k: v for k, v in quantized.items() if k != "quant_method"}))
        quantizer.validate_environment()
        vars(model)["hf_quantizer"] = quantizer  # what it says of buffers holds for whatever the model becomes
        dtype = getattr(torch, quantizer.quantization_config.compute_dtype)
        quantizer._process_model_before_weight_loading(model, dtype=dtype)
        for name in quantized.get("buffers") or []:
            holder, _, own = name.rpartition(".")
            made = model.get_buffer(name)
            put(model.get_submodule(holder), own, made.to("meta", self._stored.dtype_of(name) or made.dtype))
        return model

    def count(self) -> int:
        """Tensors in its files."""
        return self._stored.count()

    def bind(self, model: PreTrainedModel) -> None:
        """Raise a `UserError` for the first tensor of this model that no file holds, or of a file that is none of its."""
        self._stored.bind(model)

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device = CPU) -> Tensor:
        """The stored tensor of this name."""
        found = self._stored.read(name, dtype, device)
        assert isinstance(found, Tensor)
        return found
