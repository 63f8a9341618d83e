"""`train.compile`: decoder layers through torch.compile while they train, and only then.

    with Compiling(model, recipe, say) as trainer.compiling:
        trainer.train()

Layers of one kind share a graph, so a model of thirty equal layers compiles one, forward and backward. Where gradients are
not wanted (held-out loss, generation, a reference with its adapters off) the layers run as they are, and afterwards all is
as it was: what is folded, compared and saved never went through a compiler. What decides a code is an operator of ours,
which a compiler cannot look into (`quant.opaque`), so codes are the same either way.

`auto` is an estimate from the recipe and the shapes, not a measurement: two equal runs take the same way, and so does one
that continues from a checkpoint.
"""

import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any, Self

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import PreTrainedModel

from trimtab import processes
from trimtab.kernels.cache import own_folder
from trimtab.models.decoder import blocks
from trimtab.models.sharding import is_sharded
from trimtab.models.through import replaced
from trimtab.recipe.recipe import Recipe

SECONDS_A_KIND = 10.0
"""What compiling a kind of layer costs, forward and backward, in seconds (docs/performance.md: 3 to 10)."""
SECONDS_AN_ELEMENT = {"cpu": 1.4e-9}
"""What it saves for each token and each element that linear layers read and write (docs/log.md); elsewhere a hundredth."""
ROUNDED_EACH_STEP = ("levels", "master")
"""Kinds of methods whose step is mostly our own rounding, which no compiler shortens: LR-QAT's saves nothing."""
_SAID = 160
"""Characters of a compiler's complaint that are worth a line."""
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


class CompilationFailed(Exception):
    """A layer could not be compiled."""


class CompiledForward:
    """A layer's forward: compiled where gradients are wanted, elsewhere as it was.

    Args:
        layer: a decoder layer, whose first argument is its hidden states; `layer.forward = CompiledForward(layer)`.
        dynamic: as `torch.compile` takes it.
    """

    def __init__(self, layer: nn.Module, dynamic: bool | None = None) -> None:
        self.layer, self.eager = layer, layer.forward
        self.compiled = torch.compile(layer.forward, dynamic=dynamic)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own; `CompilationFailed` where it cannot be compiled."""
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.eager(hidden, *args, **kwargs)
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        try:
            # Of one kind in every layer: without gradients, a leaf and a view would each be compiled for themselves.
            return self.compiled(hidden.clone(), *args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise CompilationFailed(" ".join(str(error).split())[:_SAID]) from error


class Compiling:
    """Around a training: compiles the decoder layers if the recipe asks for it, or if it says `auto` and that pays.

    Layers that are sharded among processes are left as they are; `options` refuses a recipe that asks for both.

    Args:
        model: prepared, on the device that it trains on.
        recipe: `train` and `data` are read.
        say: told in one line what was decided.
        even: whether all batches are of one length, which a graph may then take for granted.
    """

    def __init__(
        self, model: PreTrainedModel, recipe: Recipe, say: Callable[[str], None], *, even: bool = False
    ) -> None:
        self._model, self._recipe, self._say = model, recipe, say
        self._dynamic = None if even else True
        self._forwards, self._settings = ExitStack(), ExitStack()
        self.active = False
        """Whether layers are compiled."""

    def __enter__(self) -> Self:
        """Replace the layers' forwards, if they are to be compiled."""
        asked = self._recipe.train.compile
        if asked is False or is_sharded(self._model):
            return self
        layers = list(blocks(self._model))
        kinds = len({_kind(layer) for layer in layers})
        missing = _missing(self._model.device.type)
        if asked == "auto" and not pays(self._recipe, layers, kinds, self._model.device.type):
            return self
        if missing is not None:
            warnings.warn(f"train.compile: {missing}; training continues without", stacklevel=2)
            return self
        many = "" if kinds == 1 else f" of {kinds} kinds"
        self._say(
            f"compiling the decoder layers{many}: the first step takes about {kinds * SECONDS_A_KIND:.0f} s longer"
        )
        self._configure(kinds)
        for layer in layers:
            self._forwards.enter_context(replaced(layer, CompiledForward(layer, self._dynamic)))
        self.active = True
        return self

    def _configure(self, kinds: int) -> None:
        """A graph for each kind in each of a few forms (with and without a mask); past that an error, not a silence."""
        limits = {"recompile_limit": 8 * kinds, "fail_on_recompile_limit_hit": True}
        self._settings.enter_context(torch._dynamo.config.patch(limits))
        # Backward is compiled with forward, where a failure can still be fixed.
        eager = {"force_non_lazy_backward_lowering": True}
        self._settings.enter_context(torch._functorch.config.patch(eager))
        self._settings.enter_context(warnings.catch_warnings())  # dynamo looks at what it should not
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        # torch writes its default there when it is first asked, so that one is nobody's choice.
        if os.environ.get(_CACHE) in (None, default_cache_dir()):
            os.environ[_CACHE] = str(own_folder("compiled"))
            self._settings.callback(os.environ.pop, _CACHE, None)

    def give_up(self, why: CompilationFailed) -> None:
        """Train on without compiling; settings of the process stay until the end, since others were changed within."""
        warnings.warn(f"train.compile: a layer could not be compiled ({why}); training continues without", stacklevel=2)
        self.active = False
        self._forwards.close()

    def __exit__(self, *_: object) -> None:
        """The layers as they were."""
        self.active = False
        self._forwards.close()
        self._settings.close()


def pays(recipe: Recipe, layers: list[nn.Module], kinds: int, device: str) -> bool:
    """Whether the tokens of a training save more seconds than its kinds of layers cost; twice as many, to be sure."""
    if recipe.method.kind in ROUNDED_EACH_STEP:
        return False
    elements = sum(_width(module) for layer in layers for module in layer.modules())
    tokens = recipe.train.steps * recipe.train.batch_tokens / processes.count()
    saved = tokens * elements * SECONDS_AN_ELEMENT.get(device, SECONDS_AN_ELEMENT["cpu"] / 100)
    return saved > 2 * kinds * SECONDS_A_KIND


def _width(module: nn.Module) -> int:
    """Elements that a linear layer reads and writes for a token; 0 of any other module."""
    return int(getattr(module, "in_features", 0)) + int(getattr(module, "out_features", 0))


def _kind(layer: nn.Module) -> object:
    """Equal for layers that share a graph."""
    modules = tuple((name, type(module), module.extra_repr()) for name, module in layer.named_modules())
    tensors = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return modules, tensors, getattr(layer, "attention_type", None)


def _missing(device: str) -> str | None:
    """What a compiler needs and does not find here."""
    try:
        own_folder("compiled")
    except OSError as error:
        return str(error)
    if device == "cpu":
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"
    return None if device != "cuda" or find_spec("triton") else "there is no Triton"
