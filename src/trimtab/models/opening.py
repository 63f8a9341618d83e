"""What is no linear layer in a model of transformers and can be opened to some: stacks of experts, transposed matrices."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from trimtab.layers.experts import QuantExperts, layers_in, open_up, stacks
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import DenseWeight
from trimtab.models.transposed import as_linear


def closed_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Experts that stand in stacks, by name."""
    return ((name, module) for name, module in model.named_modules() if stacks(module))


def owner_of(layer: str) -> str:
    """The name of the experts that a matrix of one is in: `mlp.experts` of `mlp.experts.3.down_proj`."""
    return layer.rsplit(".", 2)[0]


def owners_of_experts(model: nn.Module) -> dict[str, int]:
    """How many matrices the experts of each block have, by their owner's name: of those that are open, or can be."""
    found = {}
    for name, module in model.named_modules():
        count = module.num_experts * 2 if isinstance(module, QuantExperts) else sum(s.experts for s in stacks(module))
        if count:
            found[name] = count
    return found


def layers_of_experts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that they have once they are open, by their names in the model."""
    return ((f"{name}.{own}", layer) for own, layer in layers_in(module))


def open_layers(model: nn.Module, layers: Iterable[str] | None = None) -> None:
    """Open, in place, what these layers are or are in; all that there is without `layers`."""
    wanted = None if layers is None else set(layers)
    owners = None if wanted is None else set(map(owner_of, wanted))
    for name, module in list(model.named_modules()):
        if stacks(module) and (owners is None or name in owners):
            open_up(module)
        elif (linear := as_linear(module)) is not module and (wanted is None or name in wanted):
            model.set_submodule(name, linear)


def hold_the_rest(model: nn.Module) -> None:
    """What no rule gives a grid in experts that are open is stored in float: their stacks, in which it stood, are gone."""
    for name, layer in _in_open_experts(model):
        if isinstance(layer, nn.Linear):
            bias: Any = layer.bias
            model.set_submodule(name, QuantLinear(DenseWeight(layer.weight.detach()), None, bias))
    leave_unmarked(model)


def leave_unmarked(model: nn.Module) -> None:
    """Have no marker in the file for an expert: transformers would make a stack of those, by their names."""
    for _, layer in _in_open_experts(model):
        if isinstance(layer, QuantLinear):
            layer.marked = False


def _in_open_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (f"{name}.{expert}.{own}", layer)
        for name, module in model.named_modules()
        if isinstance(module, QuantExperts)
        for expert, layers in module.named_children()
        for own, layer in layers.named_children()
        if expert.isdecimal()
    ]
