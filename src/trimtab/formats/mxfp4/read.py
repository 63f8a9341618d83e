"""gpt-oss as it is published: stacks of experts in MXFP4, code for code.

    experts.down_proj_blocks    uint8 (E, N, G, 16)     two codes a byte (`quant.mxfp4`)
    experts.down_proj_scales    uint8 (E, N, G)         exponents of powers of two

transformers keeps the stack of such a pair as (E, K, N) and dequantizes all of it; here an expert's matrix by itself is a
weight (N, K) on the grid `mxfp4`. To everything else of the loader the pair is one float tensor of transformers' shape.

Legend: E experts, N out features, K in features, G = K / 32 blocks in a row.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.devices import CPU
from trimtab.errors import UserError
from trimtab.layers.experts import closed
from trimtab.layers.weights import CodebookWeight, Weight
from trimtab.models.checkpoint import Checkpoint, Stored
from trimtab.models.origin import note_grids
from trimtab.models.sources import SafetensorsSource
from trimtab.quant import mxfp4
from trimtab.quant.grid import CodebookGrid

_BLOCKS, _SCALES = "_blocks", "_scales"


class _Checkpoint(Checkpoint):
    """A folder's tensors, each pair of blocks and scales as one float stack (E, K, N).

    Raises:
        UserError: naming the stack whose tensors do not fit together.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.pairs: dict[str, tuple[Stored, Stored]] = {}
        for name in [name.removesuffix(_BLOCKS) for name in self.tensors if name.endswith(_BLOCKS)]:
            blocks, scales = self.tensors.pop(f"{name}{_BLOCKS}"), self.tensors.pop(f"{name}{_SCALES}", None)
            if scales is None:
                raise UserError(
                    f"{path}: {name}: has blocks but no scales; the checkpoint is incomplete, fetch it again"
                )
            kinds, fits = (blocks.kind, scales.kind), blocks.shape == (*scales.shape, mxfp4.BLOCK // 2)
            if kinds != ("U8", "U8") or len(scales.shape) != 3 or not fits:
                raise UserError(
                    f"{path}: {name}: blocks of {blocks.shape} and scales of {scales.shape} are no stack in MXFP4; "
                    "fetch the checkpoint again"
                )
            experts, n, groups = scales.shape
            self.pairs[name] = blocks, scales
            self.tensors[name] = Stored(blocks.file, "BF16", (experts, groups * mxfp4.BLOCK, n))

    def expert(self, name: str, expert: int) -> CodebookWeight:
        """One matrix (N, K) of a stack."""
        blocks, scales = self.pairs[name]
        taken = self.taken({"blocks": (f"{name}{_BLOCKS}", blocks), "scales": (f"{name}{_SCALES}", scales)})
        try:
            return CodebookWeight.of_powers(mxfp4.from_blocks(taken["blocks"][expert]), taken["scales"][expert].clone())
        except UserError as error:
            raise UserError(f"{self.path}: {name}, expert {expert}: {error}") from error

    def mapped(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors; stacks in MXFP4 dequantized, which is exact in bfloat16."""
        names = list(names)
        found = super().mapped(name for name in names if name not in self.pairs)
        for name in (name for name in names if name in self.pairs):
            matrices = [self.expert(name, e).dequantize(torch.bfloat16).T for e in range(self.pairs[name][1].shape[0])]
            found[name] = torch.stack(matrices)
        return found


class Mxfp4Source(SafetensorsSource):
    """A folder that says `quant_method: mxfp4`.

    Args:
        path: the folder.

    Raises:
        UserError: as `Checkpoint`, and where no tensor in it is in MXFP4.
    """

    floats = False
    came_in, by = None, "mxfp4"

    def __init__(self, path: Path) -> None:
        self._packed = _Checkpoint(path)
        if not self._packed.pairs:
            raise UserError(
                f"{path}: its quantization_config says mxfp4, and no tensor in its files is; take the config.json that was "
                "saved with the weights"
            )
        super().__init__(path, self._packed)

    def config(self) -> Any:
        """Of the model that was quantized."""
        config = super().config()
        del config.quantization_config
        return config

    def layout(self, **options: Any) -> PreTrainedModel:
        """The float model on the meta device, with a note of the experts' grid."""
        model = super().layout(**options)
        self.bind(model)
        grid = CodebookGrid("mxfp4", mxfp4.BLOCK)
        grids = {
            f"{own.rpartition('.')[0]}.{expert}.{own.rpartition('.')[2]}.weight": grid
            for own in model.state_dict()
            if (stack := self._stack(own)) is not None
            for expert in range(self._packed.pairs[stack][1].shape[0])
        }
        note_grids(model, dict(grids), kept=True)
        return model

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device = CPU) -> Tensor | Weight:
        """An expert's codes, or a tensor that stands there as it is."""
        of_stack = closed(name)
        stack = None if of_stack is None else self._stack(of_stack[0])
        if of_stack is None or stack is None:
            return super().read(name, dtype, device)
        return self._packed.expert(stack, of_stack[1]).to(device)

    def _stack(self, name: str) -> str | None:
        """The checkpoint's name of a stack of the model that is in MXFP4."""
        assert self._conversion is not None, "bind the source to a model first"
        source = self._conversion.source_of(name)
        return source if source in self._packed.pairs else None
