"""What a transformers model is once it holds our layers: its own class, with the few answers that would be wrong.

`become_prepared` gives a model a subclass of its class, under the same name, as FSDP2 does. What transformers computes
from parameters (`dtype`), from `.weight` (resizing) or from `state_dict` (saving) would be that of codes and scales.
"""

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.layers.family import class_over, empty_over
from trimtab.layers.linear import QuantEmbedding, QuantLinear, marker
from trimtab.models.whole import forget

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from transformers import PreTrainedModel as _Base
else:
    _Base = object


def quant_layers(model: nn.Module) -> dict[str, QuantLinear | QuantEmbedding]:
    """Our layers of a model by name, in its order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear | QuantEmbedding)}


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype a model computes in: that of the rows of its embedding, else of its float parameters outside our layers."""
    layers = quant_layers(model)
    for layer in layers.values():
        if isinstance(layer, QuantEmbedding):
            return layer.dtype
    ours = {id(p) for layer in layers.values() for p in layer.parameters()}
    return next((p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in ours), torch.bfloat16)


_KBIT = "prepare_model_for_kbit_training"
"""A function of peft, and of libraries that have copied it."""


class Prepared(_Base):
    """The answers that differ. Never made by itself."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in, where transformers takes the first parameter: here some scale."""
        return compute_dtype(self)

    @property
    def hqq_quantized(self) -> bool:
        """Asked by peft's `prepare_model_for_kbit_training` before it freezes every parameter and casts what is float.

        There is nothing to prepare here: to that function it is true, its pass over the parameters, the next, is given none
        that is trained, and nothing is cast. What it does besides, activation checkpointing, it does.
        """
        frame = inspect.currentframe()
        asks = frame is not None and frame.f_back is not None and frame.f_back.f_code.co_name == _KBIT
        if asks:
            self._spares_adapters = True
        return asks

    def named_parameters(self, *args: Any, **kwargs: Any) -> "Iterator[tuple[str, nn.Parameter]]":
        """As `nn.Module` does; without what is trained where peft is about to freeze it (`hqq_quantized`)."""
        spares = self.__dict__.pop("_spares_adapters", False)
        found = super().named_parameters(*args, **kwargs)
        return ((n, p) for n, p in found if not p.requires_grad) if spares else found

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable and all parameters, as peft counts them: a quantized weight as the float one."""
        ours = quant_layers(self)
        stored = {id(p) for layer in ours.values() for p in layer.base.parameters()}
        others = [p for p in self.parameters() if id(p) not in stored]
        weights = sum(x.base.shape[0] * x.base.shape[1] for x in ours.values() if not getattr(x, "tied", False))
        return sum(p.numel() for p in others if p.requires_grad), sum(p.numel() for p in others) + weights

    def print_trainable_parameters(self) -> None:
        """Print both counts, in peft's words."""
        trained, all_ = self.get_nb_trainable_parameters()
        share = 100 * trained / all_
        line = f"trainable params: {trained:,d} || all params: {all_:,d} || trainable%: {share:.4f}"
        sys.stdout.write(f"{line}\n")  # that is what it is called for

    def half(self, *_: Any) -> "Self":
        """To float16, which leaves what is stored as it is."""
        return self.to(dtype=torch.float16)  # type: ignore[call-arg]

    def float(self, *_: Any) -> "Self":
        """To float32, which leaves what is stored as it is."""
        return self.to(dtype=torch.float32)  # type: ignore[call-arg]

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers does, if the embedding and the head are float.

        Raises:
            UserError: if one of them is quantized and the number of rows would change.
        """
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        ours = [m for m in (embedding, head) if isinstance(m, QuantEmbedding | QuantLinear)]
        if not ours:
            return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        rows, multiple = ours[0].base.shape[0], kwargs.get("pad_to_multiple_of") or 1
        wanted = -(-(new_num_tokens or rows) // multiple) * multiple
        if wanted == rows:
            return embedding
        name = next(n for n, m in self.named_modules() if m is ours[0])
        raise UserError(
            f"{name}: is quantized with {rows} rows, so it cannot have {wanted}; resize the float model "
            "(`model.resize_token_embeddings(...)`) before it is prepared, or keep embedding and head in float"
        )

    def save_pretrained(self, save_directory: Any, *args: Any, whole: bool = False, **kwargs: Any) -> None:
        """Save the adapter alone where peft would and it is all there is to save (`adapter_files`), else the whole model.

        With a model card, and one warning where adapters that fold are not folded. A trainer's checkpoint
        (`checkpoint-<step>`) is whole, so that it can continue from it.

        Args:
            save_directory: the folder.
            whole: save the whole model in any case, as `trimtab.save` does, without a card.
            args: as transformers takes them.
            kwargs: as transformers takes them.
        """
        if not whole and not Path(save_directory).name.startswith("checkpoint-"):
            from trimtab.models.saving import save_for_people  # which looks into prepared models

            return save_for_people(self, Path(save_directory), args, kwargs)
        return self._save_whole(save_directory, *args, **kwargs)

    def _save_whole(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers does, with the state that was gathered (FSDP, DeepSpeed), which it drops for quantized models."""
        is_main, state = (*args, True, None)[:2] if len(args) < 2 else args[:2]
        is_main, state = kwargs.pop("is_main_process", is_main), kwargs.pop("state_dict", state)
        if is_main:
            forget(Path(save_directory))
        quantizer: Any = self.hf_quantizer
        quantizer.gathered = state
        try:
            super().save_pretrained(save_directory, is_main, None, *args[2:], **kwargs)
        finally:
            quantizer.gathered = None

    def gather_sharded_state_dict_for_save(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As transformers does, with the tensors that a plain load must fail at."""
        state: dict[str, Tensor] = super().gather_sharded_state_dict_for_save(*args, **kwargs)
        return mark(self, state) if state else state

    def __reduce_ex__(self, protocol: Any) -> Any:
        return empty_over, type(self).__bases__, self.__dict__


def mark(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add, for every weight of ours, a tensor of another shape under the name that the float weight has."""
    for name, layer in quant_layers(model).items():
        if layer.marked and not layer.reading and not (isinstance(layer, QuantLinear) and layer.tied):
            state.setdefault(f"{name}.weight", marker())
    return state


def become_prepared(model: nn.Module) -> None:
    """Give the model, and every model in it that holds layers of ours, the answers of `Prepared`."""
    from transformers import PreTrainedModel  # which imports quantizers, and so this file

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not isinstance(module, Prepared) and quant_layers(module):
            kind: Any = type(module)
            module.__class__ = class_over(Prepared, kind)
