"""The model that a config describes, on the meta device, as `from_pretrained` lays it out before it reads.

Parameters and buffers that files hold have a shape and the dtype that transformers would load them in, and no numbers.
What no file holds (rotary frequencies, masks) is made, by the model's own `_init_weights`: in its constructor it would be
made in another precision.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import build_glob_alternation

from trimtab.errors import UserError
from trimtab.kernels import tuning
from trimtab.models.architecture import ASKS_FOR
from trimtab.reading import told


def auto_class(config: Any) -> Any:
    """Which of transformers' auto classes makes the model of a config: that of text, or that of more than text.

    A config that both take (Llama 4's, Qwen3.5's) is of the whole model where it says so (`architectures`), as all that is
    saved does; else its language model is made of it, as transformers makes it for text alone.
    """
    text: Any = AutoModelForCausalLM._model_mapping
    whole: Any = AutoModelForMultimodalLM._model_mapping
    kind = type(config)
    if kind not in whole:
        return AutoModelForCausalLM
    named = getattr(config, "architectures", None) or ()
    both = kind in text and (text[kind] is whole[kind] or whole[kind].__name__ not in named)
    return AutoModelForCausalLM if both else AutoModelForMultimodalLM


def layout(path: str, config: Any, **options: Any) -> PreTrainedModel:
    """The model on the meta device; `path` is for the error message, `options` are those of `from_config`."""
    tuning.for_models()
    kind = auto_class(config)
    with told(lambda words: f"model.path: {path}: {_refusal(config, words)}"):
        model = laid_out(partial(kind.from_config, config, **options))
    if kind is not AutoModelForCausalLM and (asked := _asked(model)) is not None:
        raise UserError(
            f"model.path: {path}: a {type(model).__name__} asks for {asked}, and is given text alone here; "
            "`trimtab.prepare` takes it in memory, for a trainer of your own"
        )
    return model


def _asked(model: PreTrainedModel) -> str | None:
    """What a model that sees or hears cannot do without beside text, if anything."""
    if model.config.is_encoder_decoder:
        return "decoder_input_ids"
    required = (
        name
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and name != "input_ids"
    )
    return ASKS_FOR.get(model.config.model_type) or next(required, None)


def laid_out(construct: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model that a constructor makes, with parameters and stored buffers on the meta device and all others made."""
    with ExitStack() as stack:
        for context in (torch.device("meta"), init.no_tie_weights(), init.meta_device_safe_creation_ops()):
            stack.enter_context(context)
        model = construct()
    passing = {name for name, _ in model.named_non_persistent_buffers()}
    _empty(model, passing)
    make(model, passing)
    model.tie_weights(recompute_mapping=False)
    return model


def _refusal(config: Any, words: str) -> str:
    if type(config) in auto_class(config)._model_mapping:
        return (
            f"transformers cannot lay out the {config.model_type} model that its config.json describes ({words[:200]}); "
            "fetch it again"
        )
    made = ", ".join(map(str, getattr(config, "architectures", None) or ())) or config.model_type
    return (
        "its config.json describes no language model: neither AutoModelForCausalLM nor AutoModelForMultimodalLM takes "
        f"{made} (model_type {config.model_type}); save its language model by itself, if it has one, and start from that"
    )


def require_lasting(path: str, model: PreTrainedModel) -> None:
    """Raise a `UserError` if what is saved of a model could not be loaded again.

    Of some families AutoModelForCausalLM takes the config of the whole, but not that of the part which it makes of it.
    """
    if type(model.config) not in auto_class(model.config)._model_mapping:
        raise UserError(
            f"model.path: {path}: transformers makes a {type(model).__name__} of it, whose own config (model_type "
            f"{model.config.model_type}) AutoModelForCausalLM does not take: what is saved of it could not be loaded again"
        )


def tensors_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """All that modules hold themselves, parameters and buffers: full name, module, name in it, tensor."""
    for prefix, module in model.named_modules():
        own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in own:
            yield f"{prefix}.{name}".lstrip("."), module, name, tensor


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer of a module this value."""
    parameter = isinstance(getattr(module, name), nn.Parameter)
    setattr(module, name, nn.Parameter(value, requires_grad=False) if parameter else value)


def make(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Let transformers make these tensors of a model as it makes what no file holds; the others stay as they are."""
    wanted = set(names)
    for name, module, last, tensor in list(tensors_of(model)):
        if name in wanted:
            put(module, last, torch.empty_like(tensor, device="cpu"))
        getattr(module, last)._is_hf_initialized = name not in wanted
    for module in model.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    model.initialize_weights()


def move_made(model: nn.Module, device: torch.device) -> None:
    """Take to a device what is made, not read: all that has numbers already."""
    for _, module, name, tensor in list(tensors_of(model)):
        if not tensor.is_meta and tensor.device != device:
            put(module, name, tensor.detach().to(device))


def made_at_random(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Let transformers make these tensors, too, and name those that come out otherwise each time."""
    wanted = set(names)
    with torch.random.fork_rng(devices=[]):
        made = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            make(model, wanted)
            made.append({name: tensor for name, _, _, tensor in tensors_of(model) if name in wanted})
    return sorted(name for name in wanted if not torch.equal(made[0][name], made[1][name]))


def _empty(model: PreTrainedModel, passing: set[str]) -> None:
    """Leave no number in what files hold, and give it the dtype that the model keeps it in.

    Some constructors make tensors in ways that the meta device does not see: what is not read would keep those numbers.
    """
    dtype: Any = model.config.dtype or torch.get_default_dtype()
    kept = kept_in(model, dtype)
    for name, module, last, tensor in list(tensors_of(model)):
        if name not in passing:
            put(module, last, tensor.to("meta", kept(name) or tensor.dtype))


def kept_in(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """Which dtype a model that is loaded in `dtype` keeps a tensor of this name in; None where in `dtype` itself."""
    plan = model._get_dtype_plan(dtype)
    pattern, by_group, _ = build_glob_alternation(list(plan))

    def of(name: str) -> torch.dtype | None:
        found = pattern.search(name) if plan else None
        return None if found is None else plan[by_group[str(found.lastgroup)]]

    return of
