"""GGUF files as a source of weights: code for code where they lie on an affine grid, dequantized where not.

    Q4_0   w = d * (q - 8)      symmetric, 4 bits     | blocks of 32 along K: float16 d (and m), then codes;
    Q4_1   w = d * q + m        real zero, 4 bits     | for 4 bits byte j of a block holds code j in its low
    Q8_0   w = d * q            symmetric, 8 bits     | nibble and code j + 16 in its high one

Scales in a file are float16, so these weights have `scale_dtype: float16`; a recipe that asks for the same form gets the
file's own codes, any other gets them rounded anew. The rows of q and k are permuted in Llama files; transformers knows
how to undo that for float matrices, and since rows are independent we ask it where each row goes and move rows of
codes. gguf is imported here, to read, and in `write`, to write.

What transformers leaves out of a file's config is put into it, and the model that comes of it is held against the file's
keys and the list of its tensors (`settings`).

Legend: N out features, K in features, G = K / 32 blocks in a row.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from trimtab.errors import UserError
from trimtab.formats.gguf import rotary, settings
from trimtab.layers.weights import AffineWeight
from trimtab.models.sources import ModelSource, require_finite
from trimtab.quant import packing
from trimtab.quant.grid import Grid, Range

_BLOCK = 32
_GRIDS = {
    gguf.GGMLQuantizationType.Q4_0: Grid(4, _BLOCK, "symmetric", "float16"),
    gguf.GGMLQuantizationType.Q4_1: Grid(4, _BLOCK, "real", "float16"),
    gguf.GGMLQuantizationType.Q8_0: Grid(8, _BLOCK, "symmetric", "float16"),
}


def from_blocks(blocks: np.ndarray, kind: gguf.GGMLQuantizationType, rows: int) -> AffineWeight:
    """A weight of the very codes and scales in raw GGUF blocks.

    Args:
        blocks: uint8, the tensor's bytes, row after row.
        kind: Q4_0, Q4_1 or Q8_0.
        rows: N.
    """
    grid = _GRIDS[kind]
    header = 4 if grid.zero == "real" else 2
    raw = torch.from_numpy(np.array(blocks)).view(rows, -1, header + _BLOCK * grid.bits // 8)
    scale = raw[..., :2].contiguous().view(torch.float16).squeeze(-1)
    offset = raw[..., 2:4].contiguous().view(torch.float16).squeeze(-1) if grid.zero == "real" else None
    kept = raw[..., header:]
    # Q8_0 holds signed bytes; flipping the sign bit adds the 128 that our unsigned codes are centred on.
    codes = kept ^ 0x80 if grid.bits == 8 else torch.cat([kept & 0x0F, kept >> 4], -1)
    # A block of one value may have scale 0, by which levels cannot be divided: the code of zero stands for it on any scale.
    flat = scale == 0
    codes[flat] = 0 if grid.zero == "real" else grid.center
    scale = torch.where(flat, torch.ones_like(scale).copysign(scale), scale)
    codes = codes.reshape(rows, -1)
    return AffineWeight(packing.pack(codes, grid.bits), Range(scale, None, offset), grid, codes.shape[1])


@contextmanager
def _read_once(path: Path, reader: gguf.GGUFReader) -> Iterator[None]:
    """Lend transformers our reader of a file, and each table of tensor names once.

    It would parse the whole file again for the config and for the tokenizer, and build the table anew for every module of
    a model.
    """
    made, named = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lambda asked, *rest: reader if Path(asked) == path else made(asked, *rest)  # type: ignore[assignment,misc]
    gguf.get_tensor_name_map = cache(named)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = made, named  # type: ignore[misc]


class GgufSource(ModelSource):
    """Tensors, config and tokenizer of one GGUF file.

    Args:
        path: the file.

    Raises:
        UserError: if the file is truncated or no GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
            self._tensors = {t.name: t for t in self._reader.tensors}
        except (ValueError, IndexError, OSError) as error:
            raise UserError(f"{path}: not a complete GGUF file ({error}); fetch it again") from error
        self._names: dict[str, str] = {}
        self._processor: TensorProcessor | None = None
        self._answers: dict[str, Any] = {}

    @property
    def reader(self) -> gguf.GGUFReader:
        """gguf's own view of the file: its metadata and raw tensors."""
        return self._reader

    def config(self) -> Any:
        """The transformers config that the file's metadata describes.

        Raises:
            UserError: naming a key that may change what the model computes and that no config holds.
        """
        if "config" not in self._answers:
            with self._named():
                settings.require_single(self.keys())
            found = self._ask("model", AutoConfig)
            with self._named():
                settings.complete(found, self.keys())
            for name, ids in self._special_ids().items():
                setattr(found, name, ids)
            self._answers["config"] = found
        return copy.deepcopy(self._answers["config"])

    def keys(self) -> settings.Keys:
        """What the file says of its model."""
        values = {n: f.contents() for n, f in self._reader.fields.items() if not n.startswith("GGUF.")}
        if values.get("split.count", 1) > 1:
            raise UserError(f"is one of {values['split.count']} parts; join them with llama.cpp's gguf-split")
        architecture = str(values["general.architecture"])
        inside = f"{architecture}."
        return settings.Keys(
            architecture,
            {n.removeprefix(inside): value for n, value in values.items() if n.startswith(inside)},
            {n: torch.from_numpy(self._tensors[n].data.copy()) for n in rotary.TENSORS if n in self._tensors},
            frozenset(self._tensors),
        )

    def _special_ids(self) -> dict[str, Any]:
        """Tokens that begin and end a text, by the config's names; transformers gives them to the tokenizer alone."""
        ids = {}
        for name in ("bos", "eos", "eot", "eom"):
            field = self._reader.fields.get(f"tokenizer.ggml.{name}_token_id")
            if field is not None:
                ids[name] = int(field.contents())
        ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
        found: dict[str, Any] = {"bos_token_id": ids["bos"]} if "bos" in ids else {}
        return found | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say which file an error is about, and what else can be read."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.path}: {error}; use the model's safetensors, or another GGUF file of it") from error

    def tokenizer(self) -> Any:
        """The tokenizer that the file carries, with its chat template."""
        return self._ask("tokenizer", AutoTokenizer)

    def _ask(self, what: str, kind: Any) -> Any:
        """Once: transformers parses the whole vocabulary each time, which takes seconds."""
        if what in self._answers:
            return self._answers[what]
        try:
            with _read_once(self.path, self._reader):
                self._answers[what] = kind.from_pretrained(self.path.parent, gguf_file=self.path.name)
            return self._answers[what]
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise UserError(
                f"{self.path}: transformers cannot read its {what} ({error!r}); "
                "use another GGUF file of it, or its safetensors"
            ) from error

    def bind(self, model: PreTrainedModel) -> None:
        """Learn which tensor is which parameter of this (meta-device) model.

        Raises:
            UserError: naming a key in which the file and the model differ, or a tensor that is no parameter of it.
        """
        architecture = str(self._reader.fields["general.architecture"].contents())
        config = model.config.to_dict()
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
        try:
            with _read_once(self.path, self._reader):
                hf_of = get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: transformers cannot read its model ({error}); use its safetensors"
            ) from error
        self._names = {hf_name: name for name, hf_name in hf_of.items()}
        with self._named():
            settings.require_agreement(model, self.keys())
            for name in self._tensors:
                if name not in hf_of and name not in rotary.TENSORS:
                    raise UserError(f"tensor {name} is no parameter of a {model.config.model_type} model here")

    def name_of(self, name: str) -> str | None:
        """The file's name for the parameter of this name, or None."""
        return self._names.get(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor | AffineWeight:
        """The parameter of this name: stored codes where the file's form is one of ours, else float32."""
        assert self._processor is not None, "bind the source to a model first"
        tensor = self._tensors.get(self._names.get(name, ""))
        if tensor is None:
            raise UserError(f"{self.path}: holds no tensor for {name}; the file is incomplete or of another model")
        if tensor.tensor_type in _GRIDS and len(tensor.shape) == 2:
            weight = from_blocks(tensor.data, tensor.tensor_type, int(tensor.shape[1]))
            require_finite(weight.scale, name)
            if weight.offset is not None:
                require_finite(weight.offset, name)
            order = self._row_order(tensor.name, weight.shape[0])
            return weight if order is None else _reordered(weight, order)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        processed = self._processor.process(values, tensor.name, tensor_key_mapping=self._names, parsed_parameters={})
        return torch.from_numpy(np.require(processed.weights, np.float32, ("C", "W")))

    def _row_order(self, name: str, rows: int) -> Tensor | None:
        """Where each row of a matrix comes from, found by sending row numbers through transformers' conversion."""
        assert self._processor is not None
        numbers = np.arange(rows, dtype=np.float32)[:, None]
        moved = self._processor.process(numbers, name, tensor_key_mapping=self._names, parsed_parameters={}).weights
        return None if np.array_equal(moved, numbers) else torch.from_numpy(moved[:, 0].astype(np.int64))


def _reordered(weight: AffineWeight, order: Tensor) -> AffineWeight:
    offset = None if weight.offset is None else weight.offset[order]
    return AffineWeight(weight.codes[order], Range(weight.scale[order], None, offset), weight.grid, weight.shape[1])
