"""Experts of a mixture, each matrix of each expert a layer of its own.

transformers keeps the experts of a block in two stacks, gate_up (E, 2 I, K) and down (E, N, I), and multiplies by slices:

    y_t = sum over the chosen e of  p_te * down_e(gate(gate_up_e x_t))

`open_up` gives each slice a name, `experts.3.gate_up_proj` and `experts.3.down_proj`, under which it is an ordinary linear
layer: rules, ranks, methods, folding, plans, searches and exports then know experts without a word about them. What a
family does between the two products (`_apply_gate`: clamps, interleaved rows; a norm behind them) stays its own class's.
Only experts that a token chose are computed, one after another, so that one matrix in float is there at a time.

The road not taken: one stored weight (E, N, K) for a stack, with one kernel call for all the experts that a batch chose. A
batch of a few hundred tokens chooses all of them, and their matrices in float at once are what few bits were to spare. Rows
are rounded one by one, so the codes are the same either way.

Legend: E experts, T tokens, C choices of a token, N out features, K in features, I features between the two products.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.layers.family import class_over, empty_over, seems_read

Holding = Literal["", "alone", "stack"]
"""How files hold a layer that is an expert's matrix: by itself, or in one tensor with those of all others."""

_DECLARED = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")
"""What transformers' `use_experts_implementation` says of experts that it can compute in several ways."""


class Stack(NamedTuple):
    """One of the 3-D parameters of experts that are not open."""

    name: str
    weight_ENK: Tensor
    bias_EN: Tensor | None
    is_transposed: bool
    """Whether the family keeps it as (E, K, N)."""

    @property
    def experts(self) -> int:
        """E."""
        return self.weight_ENK.shape[0]

    def layer(self, expert: int) -> nn.Linear:
        """One matrix of it, and its bias, as a linear layer on the same memory."""
        weight_NK = self.weight_ENK[expert]
        made = nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=False, device="meta")
        made.weight = nn.Parameter(weight_NK, requires_grad=False)
        if self.bias_EN is not None:
            made.bias = nn.Parameter(self.bias_EN[expert], requires_grad=False)
        return made


def stacks(module: Any) -> list[Stack]:
    """The stacks of experts that transformers declares, in the order in which a token meets them; [] of all else."""
    own = vars(module)
    if isinstance(module, QuantExperts) or any(key not in own for key in _DECLARED):
        return []
    found = []
    for name in names(module):
        weight, bias = module._parameters.get(name), module._parameters.get(f"{name}_bias")
        if weight is None or weight.dim() != 3 or (bias is None and module.has_bias):
            return []
        weight = weight.detach()
        weight_ENK = weight.transpose(1, 2) if module.is_transposed else weight
        found.append(Stack(name, weight_ENK, None if bias is None else bias.detach(), module.is_transposed))
    return found


def names(module: Any) -> tuple[str, str]:
    """What the two products of an expert are called, in their order."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def layers_in(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that experts have once they are open, by their names in it."""
    found = stacks(module)
    for expert in range(found[0].experts if found else 0):
        for stack in found:
            yield f"{expert}.{stack.name}", stack.layer(expert)


class QuantExperts(nn.Module):
    """Experts that are open: a base of the class that `open_up` makes for a family's own."""

    reading = False
    """Whether transformers is reading a file into it."""
    has_gate: bool
    has_post_expert_norm: bool
    num_experts: int
    is_transposed: bool
    act_fn: Any

    def __getattr__(self, name: str) -> Any:
        if "has_gate" in self.__dict__ and name.removesuffix("_bias") in names(self):
            if self.reading:
                return seems_read((0,))
            raise AttributeError(
                f"{type(self).__name__} has no stack `{name}`: each expert is a layer of its own here, `[3].{name}`"
            )
        return super().__getattr__(name)

    def __getitem__(self, expert: int) -> Any:
        """The layers of one expert."""
        return self._modules[str(expert)]

    def forward(self, hidden_TK: Tensor, chosen_TC: Tensor, weight_TC: Tensor) -> Tensor:
        """What the chosen experts make of each token, (T, N), weighted and added up.

        Args:
            hidden_TK: the tokens.
            chosen_TC: numbers of their experts; the number E stands for none.
            weight_TC: of each choice.
        """
        out = torch.zeros_like(hidden_TK)
        for expert in self._in_turn(chosen_TC):
            token, choice = self._where(chosen_TC, expert)
            y = self._of(self[expert], hidden_TK[token]) * weight_TC[token, choice, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _in_turn(self, chosen_TC: Tensor) -> list[int]:
        """The experts that are chosen; all of them where processes have to do the same (gradients are then summed)."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if chosen_TC.is_meta or (several and torch.is_grad_enabled()):
            return list(range(self.num_experts))
        found: list[int] = chosen_TC.unique().tolist()
        return [e for e in found if e < self.num_experts]

    def _where(self, chosen_TC: Tensor, expert: int) -> tuple[Tensor, ...]:
        """The tokens that chose an expert, and which of their choices it was; of a plan, without data, an even share."""
        if chosen_TC.is_meta:
            share = chosen_TC.new_zeros(-(-chosen_TC.numel() // self.num_experts))
            return share, share
        return torch.where(chosen_TC == expert)

    def _of(self, expert: Any, x_TK: Tensor) -> Tensor:
        first, last = names(self)
        inner = getattr(expert, first)(x_TK)
        gated = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        y: Tensor = getattr(expert, last)(gated)
        return self.post_expert_norm(y) if self.has_post_expert_norm else y

    def __reduce_ex__(self, protocol: Any) -> Any:
        return empty_over, type(self).__bases__, self.__dict__


def open_up(module: Any) -> None:
    """Make experts open, in place: their stacks go, and layers on the same memory come."""
    layers = list(layers_in(module))
    assert layers, "no stacks of experts"
    for stack in stacks(module):
        del module._parameters[stack.name]
        if stack.bias_EN is not None:
            del module._parameters[f"{stack.name}_bias"]
    kind: Any = type(module)
    module.__class__ = class_over(QuantExperts, kind)
    for name, layer in layers:
        expert, _, own = name.partition(".")
        if expert not in module._modules:
            module.add_module(expert, nn.Module())
        module._modules[expert].add_module(own, layer)


def closed(name: str) -> tuple[str, int] | None:
    """The stack that a tensor `….experts.3.gate_up_proj.weight` (or `.bias`) is of, by its name, and its expert; else None.

    Only the name is looked at: the caller knows that the experts are open.
    """
    parts = name.split(".")
    if len(parts) < 4 or not parts[-3].isdecimal():
        return None
    ending = {"weight": "", "bias": "_bias"}.get(parts[-1])
    return None if ending is None else (f"{'.'.join(parts[:-3])}.{parts[-2]}{ending}", int(parts[-3]))
