"""Statistics of what goes into layers, gathered one decoder block at a time.

Every window's hidden state is kept between blocks. A block is entered (made float by the caller, if it was not), run once
over all windows while the inputs of its layers are summed up, left (quantized by the caller), and run again, so that the
next block sees what the quantized ones before it give. At any moment there is one block in float, its Hessians, and
W x L x D hidden numbers.

What a block is called with besides the hidden state (masks, positions, rotary embeddings) does not depend on it, so it is
recorded once, in a pass through the model in which every block hands its input on.

Legend: W windows, L tokens in a window, D hidden size, K in features of a layer.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.models.decoder import block_names


def by_block(model: nn.Module, layers: Sequence[str]) -> dict[str, list[str]]:
    """The layers in each decoder block; blocks without any are there too, layers outside every block are not."""
    return {block: [name for name in layers if name.startswith(f"{block}.")] for block in block_names(model)}


class _Sums:
    """X^T X of the inputs of some layers; layers that are given the same tensor share one sum."""

    def __init__(self) -> None:
        self.hessians: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, name: str, x: Tensor) -> None:
        """Add one forward pass's input."""
        if self._last is not None and self._last[0] is x:
            self.hessians[name] = self._last[1]
            return
        rows = x.flatten(0, -2).float()
        if name not in self.hessians:
            self.hessians[name] = torch.zeros(rows.shape[1], rows.shape[1], device=x.device)
        self.hessians[name].addmm_(rows.T, rows)
        self._last = x, self.hessians[name]


@contextmanager
def _summing(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    sums = _Sums()

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: sums.add(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    try:
        yield sums.hessians
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def calibrate(
    model: Any,
    tokens_WL: Tensor,
    layers: Mapping[str, Sequence[str]],
    enter: Callable[[str], None],
    leave: Callable[[str, dict[str, Tensor]], None],
) -> None:
    """Walk through the decoder blocks.

    Args:
        model: a transformers model whose parts outside the blocks are in place.
        tokens_WL: calibration windows.
        layers: the layers to watch in each block (from `by_block`, or fewer of them).
        enter: told a block's name before it is run in float.
        leave: told its name, and the Hessian X^T X (K, K), float32, of each watched layer; quantizes the block.
    """
    training = model.training
    model.eval()
    try:
        states, calls = first_inputs(model, list(layers), tokens_WL)
        for block, watched in layers.items():
            enter(block)
            with _summing(model, watched) as hessians:
                run(model.get_submodule(block), states, calls[block])
            leave(block, hessians)
            states = run(model.get_submodule(block), states, calls[block])
    finally:
        model.train(training)


def run(block: nn.Module, states: list[Tensor], call: dict[str, Any]) -> list[Tensor]:
    """What a block gives for each state."""
    return [hidden_of(block(state, **call)) for state in states]


def hidden_of(output: Any) -> Tensor:
    """The hidden state among what a block gives."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def first_inputs(model: Any, blocks: list[str], tokens_WL: Tensor) -> tuple[list[Tensor], dict[str, dict[str, Any]]]:
    """The first block's input for each window (1, L, D), and the other arguments of every block, by their names."""
    states: list[Tensor] = []
    calls: dict[str, dict[str, Any]] = {}

    def handing_on(block: str, module: nn.Module) -> Callable[..., Tensor]:
        known = inspect.signature(type(module).forward).parameters.values()
        _, _, *names = (p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD)

        def forward(hidden: Tensor, *unnamed: Any, **call: Any) -> Tensor:
            if block == blocks[0]:
                states.append(hidden)
            calls[block] = dict(zip(names[: len(unnamed)], unnamed, strict=True)) | call
            return hidden

        return forward

    modules = {block: model.get_submodule(block) for block in blocks}
    try:
        for block, module in modules.items():
            module.forward = handing_on(block, module)
        device = next(iter(model.get_input_embeddings().parameters())).device
        for window in tokens_WL.to(device).split(1):
            model.base_model(input_ids=window, use_cache=False)
    finally:
        for module in modules.values():
            del module.forward
    return states, calls
