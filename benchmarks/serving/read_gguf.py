"""Whether every matrix of a GGUF file that lies on a grid is read code for code: our numbers beside the gguf package's.

python benchmarks/serving/read_gguf.py FILE      counts by type, and how many differ in any bit
"""

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import gguf
import numpy as np
import torch

from benchmarks.files import say
from trimtab.formats.gguf.read_blocks import GRIDS, from_blocks


class Matrices(NamedTuple):
    """The tensors of a file."""

    on_a_grid: Counter[str]
    """Matrices on a grid of ours, by type."""
    others: Counter[str]
    differing: list[str]
    """Names of those on a grid whose values the gguf package reads otherwise, in any bit."""


def matrices(path: Path) -> Matrices:
    """What a file holds, and whether it is read as gguf reads it."""
    found = Matrices(Counter(), Counter(), [])
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type not in GRIDS or len(tensor.shape) != 2:
            found.others[tensor.tensor_type.name] += 1
            continue
        found.on_a_grid[tensor.tensor_type.name] += 1
        ours = from_blocks(tensor.data, tensor.tensor_type, int(tensor.shape[1])).dequantize(torch.float32).numpy()
        if not np.array_equal(ours, gguf.quants.dequantize(tensor.data, tensor.tensor_type)):
            found.differing.append(tensor.name)
    return found


def main() -> None:
    """The command."""
    kinds, others, differing = matrices(Path(sys.argv[1]))
    say(f"on a grid: {dict(kinds)}; others: {dict(others)}")
    say(f"{kinds.total()} matrices, {len(differing)} differ{''.join(f' {name}' for name in differing)}")


if __name__ == "__main__":
    main()
