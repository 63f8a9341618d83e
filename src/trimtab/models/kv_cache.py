"""Keys and values on a grid, in every model that uses transformers' attention interface: a simulated KV cache.

    k_hat = round to the grid (k after RoPE)      v_hat = round to the grid (v)      attention(q, k_hat, v_hat)

Each head of each token has a range of its own, so a token's keys and values are the same numbers in training, in evaluation
and when generation reads them back from a cache: nothing depends on what stands beside them. It is a **simulation**:
the cache itself stays in the compute dtype and is rounded whenever it is read. No cache memory is saved.

It hangs on a name. transformers looks an attention function up by the name in `config._attn_implementation`, and the
function that makes masks by the same name; so every kind of rounding is registered under one name in both tables. Without
the second, masks are not made at all, and packed documents attend to each other without a word. The name is the only
state: a copy of a model keeps it. `config.json` does not, so our quantizer restores it (see `transformers_bridge`).
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.quant.activations import KvCache, round_to_grid, token_range

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INNER = ("sdpa", "eager")


def _name(kv: KvCache, inner: str) -> str:
    return f"trimtab_kv{kv.bits}_{'symmetric' if kv.symmetric else 'asymmetric'}_{inner}"


def _attend(
    kv: KvCache, inner: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention of that name on rounded keys and values (batch, heads, tokens, head size)."""
    key, value = (round_to_grid(t, token_range(t, kv.bits, kv.symmetric), kv.bits) for t in (key, value))
    out: tuple[Tensor, Tensor | None] = _function(inner, module)(module, query, key, value, *args, **kwargs)
    return out


def _function(inner: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function of that name for this module."""
    if inner == "eager":  # every model's file has its own
        eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return eager
    from transformers import AttentionInterface

    function: Callable[..., Any] = AttentionInterface()[inner]
    return function


_KINDS = [KvCache(bits, symmetric) for bits, symmetric in product((8, 4), (False, True))]  # type: ignore[arg-type]
_NAMED = {_name(kv, inner): (kv, inner) for kv, inner in product(_KINDS, _INNER)}


def _register(name: str) -> None:
    """Enter the attention of this name, and the maker of its masks."""
    # Here, not above: `transformers_bridge` imports this file while transformers is still importing its own models.
    from transformers import AttentionInterface, AttentionMaskInterface

    kv, inner = _NAMED[name]
    AttentionInterface.register(name, partial(_attend, kv, inner))
    AttentionMaskInterface.register(name, AttentionMaskInterface()[inner])


def attention_of(model: "PreTrainedModel") -> str:
    """The name of a model's attention."""
    return str(model.config.get_text_config()._attn_implementation)


def current(model: "PreTrainedModel") -> KvCache | None:
    """How a model rounds its keys and values, or None."""
    kv, _ = _NAMED.get(attention_of(model), (None, ""))
    return kv


def install(model: "PreTrainedModel", kv: KvCache) -> None:
    """Have a model round its keys and values from now on; its kind of attention (sdpa, eager) stays.

    Raises:
        UserError: for a model whose attention cannot be replaced.
    """
    now = attention_of(model)
    _, inner = _NAMED.get(now, (None, now))
    if inner not in _INNER:
        raise UserError(
            f"kv: the model's attention is {inner!r}, and only {' and '.join(_INNER)} attention can be given rounded keys "
            "and values; load it with `attn_implementation='sdpa'`"
        )
    name = _name(kv, inner)
    _register(name)
    model.set_attn_implementation(name)
    if attention_of(model) != name:
        raise UserError(
            f"kv: {type(model).__name__} does not use transformers' attention interface, so its keys and values cannot be "
            "rounded; leave `kv` out"
        )
