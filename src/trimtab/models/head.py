"""From the last hidden states to logits: what a loss, a divergence and a sensitivity compute without running the model.

    logits = c tanh( f (W h + b) / c )         f: a factor, c: a cap; most families have neither

Where families keep f and c differs, and the same key of a config divides in one family (Granite), multiplies in another
(HyperCLOVA X) and divides the hidden states in a third (MiniCPM3). So keys only say which numbers to try: for a family that
is not described in `architecture`, the model itself is asked once, with two tokens, and what does not give its logits is
not used. Where nothing does, `Head.fits` says no, and the caller takes the model's own logits.

Legend: C tokens of a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.layers.linear import QuantLinear
from trimtab.models.architecture import architecture_of
from trimtab.models.asked import softcap
from trimtab.models.through import through

_CLOSE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Difference of logits, as a share of the largest, that roundings of a dtype explain."""


@dataclass(frozen=True)
class AfterHead:
    """What a model does to the product of its head: f, and c or None."""

    factor: float = 1.0
    softcap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """Logits from W h + b in float32, which may be overwritten."""
        logits = product if self.factor == 1 else product.mul_(self.factor)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits by W h + b."""
        return self.factor if self.softcap is None else (1 - (logits / self.softcap).square()).mul_(self.factor)


@dataclass(frozen=True)
class Head:
    """The frozen head of a causal model, and what follows it."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    after: AfterHead = AfterHead()

    @classmethod
    def fits(cls, model: Any) -> bool:
        """Whether head and `AfterHead` are all that follows the last hidden states of this model."""
        return after_head(model) is not None

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype, *, reuse: bool = False) -> "Head":
        """The head of a model that it fits.

        Args:
            model: its head is a linear layer, float or ours.
            dtype: of the hidden states.
            reuse: a quantized head may lie in the shared buffer; no other layer may then run until the loss is there.

        Raises:
            UserError: for a model that it does not fit.
        """
        return cls(*_parameters(model, dtype, reuse), require_after_head(model))

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Float32 logits (C, V)."""
        return self.after(nn.functional.linear(hidden_CD, self.weight_VD, self.bias_V).float())


def _parameters(model: Any, dtype: torch.dtype, reuse: bool) -> tuple[Tensor, Tensor | None]:
    head = model.get_output_embeddings()
    quantized = isinstance(head, QuantLinear)
    weight = head.dequantize(dtype, reuse=reuse) if quantized else head.weight.detach().to(dtype)
    return weight, None if head.bias is None else head.bias.detach().to(dtype)


_asked: WeakKeyDictionary[nn.Module, AfterHead | None] = WeakKeyDictionary()


def after_head(model: nn.Module) -> AfterHead | None:
    """What a model does to its head's product; None where it is not of that form.

    A family that is described is known; any other is asked, once for each model, by a pass over two tokens.
    """
    if architecture_of(model).known:
        return AfterHead(softcap=softcap(model.config))
    if model not in _asked:
        _asked[model] = _ask(model)
    return _asked[model]


def require_after_head(model: Any) -> AfterHead:
    """The same, or a `UserError` where it is not of that form."""
    after = after_head(model)
    if after is None:
        raise UserError(
            f"{model.config.model_type}: its logits are not its head's product, multiplied by a number of its config or "
            "capped; describe what it does in models/head.py"
        )
    return after


@torch.no_grad()
def _ask(model: Any) -> AfterHead | None:
    training, seen = model.training, list[Tensor]()
    ids_BL = torch.tensor([[1, 2]], device=next(model.parameters()).device)

    def parts(input_ids: Tensor) -> Tensor:
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        weight, bias = _parameters(model, hidden.dtype, reuse=False)
        if hidden.shape[-1] == weight.shape[1]:
            seen.append(nn.functional.linear(hidden, weight, bias))
        return hidden

    model.eval()
    try:
        through(model, model, parts, input_ids=ids_BL)
        logits = model(input_ids=ids_BL, use_cache=False).logits.float()
    finally:
        model.train(training)
    if not seen or seen[0].shape != logits.shape:
        return None
    dtype, product = seen[0].dtype, seen[0].float()
    differences = {after: (after(product.clone()) - logits).abs().max().item() for after in _candidates(model.config)}
    best = min(differences, key=lambda after: differences[after])
    return best if differences[best] <= _CLOSE[dtype] * logits.abs().max().item() else None


def _candidates(config: Any) -> Iterator[AfterHead]:
    """Plain first: where logits are all zero, anything fits."""
    text, family = config.get_text_config(), architecture_of(config)
    numbers = [getattr(text, key, None) for key in family.logit_factors]
    factors = [1.0, *(f for n in numbers if isinstance(n, int | float) and n for f in (float(n), 1 / n))]
    for factor in dict.fromkeys(factors):
        for cap in dict.fromkeys((softcap(config), None)):
            yield AfterHead(factor, cap)
