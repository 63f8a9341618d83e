"""Which of transformers' attentions a model trains with: sdpa, flash_attention_2 or eager.

They are one function in other orders of its sums, so a model is folded, compared, saved and measured in the end with its
own (the one that a reload will choose), and has the recipe's only while it trains. Held-out losses of that time are taken
with the recipe's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from trimtab.errors import UserError
from trimtab.models.kv_cache import attention_of, current

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO = "auto"


@contextmanager
def attending(model: "PreTrainedModel", name: str) -> Iterator[None]:
    """With the attention of this name, or with `auto` the model's own; its own comes back at the end.

    Raises:
        UserError: where the model cannot have it.
    """
    own = attention_of(model)
    if name in (AUTO, own):
        yield
        return
    if current(model) is not None:
        raise UserError(
            f"train.attention: {name}: this model rounds its keys and values (`kv`) in an attention of its own; use auto"
        )
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"train.attention: {type(model).__name__} cannot use {name}: {why}") from error
    try:
        if attention_of(model) != name:
            raise UserError(f"train.attention: the attention of {type(model).__name__} cannot be replaced; use auto")
        yield
    finally:
        model.set_attn_implementation(own)


def check_attention(layout: "PreTrainedModel", name: str, dtype: torch.dtype, device: torch.device, kv: bool) -> None:
    """Raise a `UserError` where an attention cannot serve, before a weight is read.

    Args:
        layout: the model on the meta device; left as it is.
        name: auto, sdpa, flash_attention_2 or eager.
        dtype: that it computes in.
        device: that it computes on.
        kv: whether the recipe rounds keys and values.
    """
    if name == AUTO:
        return
    if kv:
        raise UserError(f"train.attention: {name}: `kv` rounds keys and values in an attention of its own; use auto")
    if name == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if device.type != "cuda":
            raise UserError(f"train.attention: flash_attention_2 runs on CUDA, and model.device is {device}; use sdpa")
        if dtype == torch.float32:
            raise UserError("train.attention: flash_attention_2 computes in bfloat16 or float16; set model.dtype")
        if not is_flash_attn_2_available():
            raise UserError("train.attention: flash_attention_2 needs a library: pip install flash-attn; or use sdpa")
    with attending(layout, name):
        pass
