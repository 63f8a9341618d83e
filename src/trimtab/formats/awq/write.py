"""AWQ in the `gemm` packing, which vLLM reads, and transformers with gptqmodel. A file of it says nothing of how its codes
were found; AutoAWQ's layout is

    qweight   int32 (K, N / 8)    eight codes of a row of W^T in a word, in the order 0 2 4 6 1 3 5 7 from the lowest bits
    qzeros    int32 (G, N / 8)    zeros in the same order, as they are; symmetric: all 8
    scales    float16 (G, N)

    W[n, k] = scales[g, n] * (q - z)

and its config has one group size for all layers. It holds what GPTQ's layout does at 4 bits, where N is a multiple of 8;
vLLM's kernels read integer zeros here, and not there. transformers by itself reads neither.

Readers look for the names of `modules_to_not_convert` *inside* the names of layers (transformers at their beginning and
end). A layer in float whose name is a part of that of a packed one would take that along, so it is refused.

Legend: N out features, K in features, G groups in a row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.formats.awq.read import A_WORD, BITS, ORDER
from trimtab.formats.declaration import DENSE, Engine, Form, Format, Layer, Refusal, Writing
from trimtab.formats.directory import write_surroundings
from trimtab.formats.gptq.write import one_grid, stored, write_layers
from trimtab.quant.grid import Grid, Range, Zero


def packed(codes_NK: Tensor, range_: Range, grid: Grid) -> dict[str, Tensor]:
    """One layer's tensors, by the names that follow the layer's own.

    Args:
        codes_NK: uint8 codes (N, K), each below 16.
        range_: scales and integer zeros, (N, G); scales are exact in float16.
        grid: of 4 bits, symmetric or with integer zeros.
    """
    scale_GN, zero_GN = stored(range_, grid)
    return {"qweight": _words(codes_NK.T), "qzeros": _words(zero_GN), "scales": scale_GN}


def _words(codes_RC: Tensor) -> Tensor:
    """int32 (R, C / 8) of codes (R, C)."""
    in_words = codes_RC.unflatten(1, (-1, A_WORD)).to(torch.int32)
    found = torch.zeros_like(in_words[..., 0])
    for i, column in enumerate(ORDER):
        found |= in_words[..., column] << (BITS * i)
    return found


_ZEROS: tuple[Zero, ...] = ("symmetric", "integer")
_VLLM: dict[str, Any] = {
    "bits": (BITS,),
    "zeros": _ZEROS,
    "fuses": True,
    "casts_scales": True,
    "lacks": frozenset({"implied heads"}),
}


class Awq(Format):
    """4 bits, one group size for all layers, float16 scales."""

    name = "awq"
    summary = "AWQ (gemm): 4 bits and one group for all layers, for vLLM, gptqmodel, and transformers with it"
    forms = (Form(name="gemm", bits=(BITS,), zeros=_ZEROS, rows_of=A_WORD, scales="float16"),)
    engines = (
        Engine(name="vllm", groups=(None, 32, 64, 128), **_VLLM),
        Engine(name="vllm-cpu", **_VLLM),
        Engine(name="gptqmodel", bits=(BITS,), zeros=_ZEROS, groups=(None, 16, 32, 64, 128)),
    )

    def model_refusal(self, layers: Sequence[Layer], engine: str | None) -> Refusal | None:
        """One group for the whole model."""
        return one_grid(layers, self.name)

    def write(self, folder: Path, writing: Writing) -> None:
        """Packed codes where a form took the layer, float matrices elsewhere.

        Raises:
            UserError: naming a layer in float whose name readers would find in that of a packed one.
        """
        grids, skipped = write_layers(folder, writing, packed)
        head = writing.model.get_output_embeddings()
        heads = {name for name, module in writing.model.named_modules() if module is head}  # float to every reader
        skipped = [name for name in skipped if name not in heads]
        for layer in (name for name, form in writing.forms.items() if form is not DENSE):
            for part in (name for name in skipped if name in layer):
                raise UserError(
                    f"export: {self.name}: {part}: is in float, and its name is a part of {layer}, which readers of "
                    f"{self.name} would take for float, too; give both a grid, or export to compressed-tensors"
                )
        write_surroundings(folder, writing.model, writing.tokenizer, writing.dtype, config(grids[0], skipped))


def config(grid: Grid, skipped: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of a model on this grid, whose `skipped` linear layers are float.

    `zero_point` holds for symmetric grids, too: without it readers leave the zeros of the file out, and there are some.
    """
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": grid.bits,
        "group_size": grid.group or -1,
        "zero_point": True,
        "modules_to_not_convert": list(skipped) or None,
    }
