"""What happens to a decoder block while a model is read: its tensors come, and once all of them are there it is sharded.

    in one process      layers are put in place one after another, and what no rule touched is read at the end
    in several          a block's norms and biases are read after its last layer, and the block is sharded at once

So of a model that is sharded a process never holds more than its parts, one block, and what lies outside the blocks, which
it has to hold while it runs, too. Every process reads all: none waits for what another one makes of it, and a file that one
of them has read comes out of the computer's cache for the others.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab.kernels import heap
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.models.calibrate import by_block
from trimtab.models.decoder import block_names
from trimtab.models.layout import tensors_of
from trimtab.models.sharding import Parting
from trimtab.models.sources import ModelSource, fill, fill_where
from trimtab.models.transformers_bridge import freeze, quant_layers


class Arrivals:
    """Reads and parts the decoder blocks of a model that is being loaded.

    Args:
        model: laid out on the meta device.
        source: bound to it.
        device: where tensors go.
        parting: None to part nothing.
    """

    def __init__(
        self, model: PreTrainedModel, source: ModelSource, device: torch.device, parting: Parting | None
    ) -> None:
        self._model, self._source, self._device, self._parting = model, source, device, parting
        self._entered: str | None = None
        self._last: dict[str, str] = {}
        """Blocks by the layer that comes last in each."""

    def expect(self, layers: Sequence[str]) -> None:
        """The layers that will be put in place, in their order."""
        self._last = {} if self._parting is None else {
            names[-1]: block for block, names in by_block(self._model, layers).items() if names
        }  # fmt: skip

    def placed(self, layer: str) -> None:
        """A layer is in place; the last of a block makes it whole."""
        if layer in self._last:
            self._whole(self._last[layer])

    def enter(self, block: str) -> None:
        """Read what is left of a block that is to be run, or with `""` of what lies outside the blocks.

        The block before it has been run, quantized, by then: it is sharded.
        """
        if self._entered:
            self._whole(self._entered)
        self._entered = block
        outside = tuple(f"{name}." for name in block_names(self._model))
        self._fill(lambda n: n.startswith(f"{block}.") if block else not n.startswith(outside))

    def fill_all(self) -> None:
        """Read all that is left, the blocks one after another where they are sharded."""
        if self._parting is not None:
            for block in block_names(self._model):
                self._whole(block)
        self._fill(lambda _: True)

    def part_the_rest(self) -> None:
        """Part what lies outside the blocks; all that is sharded is whole by then, and frozen."""
        if self._parting is not None:
            self._parting.rest(self._model)

    def _whole(self, block: str) -> None:
        """Read what is left of a block, and part it, if that was not done yet."""
        module = self._model.get_submodule(block)
        if self._parting is None or self._parting.has(module):
            return
        self._fill(lambda n: n.startswith(f"{block}."))
        freeze(module)
        self._parting.block(module)
        heap.trim()

    def _fill(self, wanted: Callable[[str], bool]) -> None:
        fill_where(self._model, self._source, wanted, self._device)
        for name, layer in quant_layers(self._model).items():
            if wanted(f"{name}."):
                fill_stored(layer, name, self._source, self._device)


def fill_stored(layer: nn.Module, name: str, source: ModelSource, device: torch.device) -> None:
    """Read what is left of a layer of ours, each tensor in the dtype that it is stored in."""
    assert isinstance(layer, QuantLinear | QuantEmbedding)
    for own, module, last, tensor in list(tensors_of(layer)):
        if tensor.is_meta:
            fill(module, last, f"{name}.{own}", source, device)
    layer.reading = False
