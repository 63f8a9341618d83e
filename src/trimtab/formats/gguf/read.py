"""GGUF files as a source of weights: code for code where they lie on an affine grid (`read_blocks`), dequantized where not.

A recipe that asks for the grid that a tensor has in the file (`grid: same` does) gets the file's own codes, any other gets
them rounded again. The rows of q and k are permuted in Llama files; transformers knows
how to undo that for float matrices, and since rows are independent we ask it where each row goes and move rows of
codes. gguf is imported here, to read, and in `write`, to write.

What transformers leaves out of a file's config is put into it, and the model that comes of it is held against the file's
keys and the list of its tensors (`settings`).
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

from trimtab.devices import CPU
from trimtab.errors import UserError
from trimtab.formats.gguf import header, rotary, settings
from trimtab.formats.gguf.read_blocks import GRIDS, from_blocks
from trimtab.layers.weights import AffineWeight, CodebookWeight, Weight
from trimtab.models import believable
from trimtab.models.finite import require_finite
from trimtab.models.origin import note_grids
from trimtab.models.sources import ModelSource
from trimtab.models.transposed import is_transposed
from trimtab.quant.grid import Range
from trimtab.reading import require_regular, told


@contextmanager
def _read_once(path: Path, reader: gguf.GGUFReader) -> Iterator[None]:
    """Lend transformers our reader of a file, and each table of tensor names once.

    It would parse the whole file again for the config and for the tokenizer, and build the table again for every module of
    a model.
    """
    made, named = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lambda asked, *rest: reader if Path(asked) == path else made(asked, *rest)  # type: ignore[assignment,misc]
    gguf.get_tensor_name_map = cache(named)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = made, named  # type: ignore[misc]


class _Reader(gguf.GGUFReader):
    """gguf's reader, over a plain array: of a memory map each slice is a memory map, in which most of the time went.

    Gemma 3's vocabulary of 262,144 pieces: 8 s where it took 22.
    """

    def _get(self, *asked: Any, **named: Any) -> Any:
        if isinstance(self.data, np.memmap):
            self.data = self.data.view(np.ndarray)  # type: ignore[assignment]
        return super()._get(*asked, **named)


class GgufSource(ModelSource):
    """Tensors, config and tokenizer of one GGUF file.

    Args:
        path: the file.

    Raises:
        UserError: if the file is truncated or no GGUF file.
    """

    came_in = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        require_regular(path, remedy="fetch it again")
        with told(lambda words: f"{path}: not a complete GGUF file ({words}); fetch it again"):
            header.check(path)
            self._reader = _Reader(path)
            self._tensors = {t.name: t for t in self._reader.tensors}
        self._names: dict[str, str] = {}
        self._transposed: set[str] = set()
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
                keys = self.keys()
                settings.require_single(keys)
                believable.check(keys.architecture, keys.values)
            found = self._ask("model", AutoConfig)
            with self._named(), told(lambda words: f"its keys describe no model that there is ({words})"):
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
        remedy = "use another GGUF file of it, or its safetensors"
        with told(lambda words: f"{self.path}: transformers cannot read its {what} ({words}); {remedy}"):
            with _read_once(self.path, self._reader):
                self._answers[what] = kind.from_pretrained(
                    self.path.parent, gguf_file=self.path.name, trust_remote_code=False
                )
            return self._answers[what]

    def layout(self, **options: Any) -> PreTrainedModel:
        """The model on the meta device, with a note of the grid that each of its matrices has in the file."""
        model = super().layout(**options)
        self._learn(model)
        there = {hf_name: self._tensors[name] for hf_name, name in self._names.items() if name in self._tensors}
        kept = {n: tensor for n, tensor in there.items() if _on_a_grid(tensor) and self._row_order(tensor) is not None}
        note_grids(model, {n: GRIDS[tensor.tensor_type] for n, tensor in kept.items()}, kept=False)
        return model

    def _learn(self, model: PreTrainedModel) -> None:
        """Learn which tensor is which parameter of a model."""
        if self._processor is not None:
            return
        architecture = str(self._reader.fields["general.architecture"].contents())
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
        try:
            with _read_once(self.path, self._reader):
                hf_of = get_gguf_hf_weights_map(model, processor)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: transformers cannot read its model ({error}); use its safetensors"
            ) from error
        self._processor, self._names = processor, {hf_name: name for name, hf_name in hf_of.items()}
        turned = (f"{name}.weight" for name, module in model.named_modules() if is_transposed(module))
        self._transposed = {self._names[name] for name in turned if name in self._names}

    def bind(self, model: PreTrainedModel) -> None:
        """Learn which tensor is which parameter of this (meta-device) model.

        Raises:
            UserError: naming a key in which the file and the model differ, or a tensor that is not a parameter of it.
        """
        self._learn(model)
        known = {*self._names.values(), *rotary.TENSORS}
        with self._named():
            settings.require_agreement(model, self.keys())
            for name in self._tensors:
                if name not in known:
                    raise UserError(f"tensor {name} is not a parameter of a {model.config.model_type} model here")

    def count(self) -> int:
        """Its tensors."""
        return len(self._tensors)

    def name_of(self, name: str) -> str | None:
        """The file's name for the parameter of this name, or None."""
        return self._names.get(name)

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device = CPU) -> Tensor | Weight:
        """The parameter of this name: stored codes where the file's form is one of ours, else float32."""
        assert self._processor is not None, "bind the source to a model first"
        tensor = self._tensors.get(self._names.get(name, ""))
        if tensor is None:
            raise UserError(f"{self.path}: holds no tensor for {name}; the file is incomplete or of another model")
        self._check_length()
        if _on_a_grid(tensor):
            order = self._row_order(tensor)
            if order is not None:
                weight = from_blocks(tensor.data, tensor.tensor_type, len(order))
                require_finite(weight, name)
                return _reordered(weight, order).to(device)
        with told(lambda words: f"{self.path}: tensor {tensor.name} cannot be read ({words}); fetch it again"):
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            converted = self._converted(values, tensor.name)
        return torch.from_numpy(np.require(converted, np.float32, ("C", "W"))).to(device)

    def _converted(self, values: np.ndarray, name: str) -> np.ndarray:
        """A tensor of the file as transformers converts it; but a matrix that is to be `transposed` stays (N, K)."""
        assert self._processor is not None
        found: np.ndarray = self._processor.process(
            values, name, tensor_key_mapping=self._names, parsed_parameters={"tensors": {}}
        ).weights
        return found.T if name in self._transposed else found

    def _check_length(self) -> None:
        """Look whether the file is as long as when it was mapped: what is behind its end ends the process, at a touch."""
        if self.path.stat().st_size < self._reader.data.nbytes:
            raise UserError(f"{self.path}: was cut short while it was read; fetch it again")

    def _row_order(self, tensor: Any) -> Tensor | None:
        """Where each row of a matrix comes from, found by sending row numbers through transformers' conversion.

        None where that does more than move rows: then its numbers are converted.
        """
        numbers = np.arange(int(tensor.shape[1]), dtype=np.float32)[:, None]
        with told(lambda words: f"{self.path}: tensor {tensor.name} has not the rows that its keys say ({words})"):
            moved = self._converted(numbers, tensor.name)
        only_moved = moved.shape == numbers.shape and np.array_equal(np.sort(moved, 0), numbers)
        return torch.from_numpy(moved[:, 0].astype(np.int64)) if only_moved else None


def _on_a_grid(tensor: Any) -> bool:
    """Whether a tensor of a file is a matrix on a grid of ours."""
    return tensor.tensor_type in GRIDS and len(tensor.shape) == 2


def _reordered(weight: AffineWeight | CodebookWeight, order: Tensor) -> Weight:
    if torch.equal(order, torch.arange(len(order))):
        return weight
    if isinstance(weight, CodebookWeight):
        return CodebookWeight(weight.codes[order], (weight.absmax[order],), weight.grid, weight.shape[1])
    scale, _, offset = weight.range()
    range_ = Range(scale[order], None, None if offset is None else offset[order])
    return AffineWeight(weight.codes[order], range_, weight.grid, weight.shape[1])
