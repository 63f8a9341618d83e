"""Whether every matrix of a GGUF file that lies on a grid is read code for code: our numbers beside the gguf package's.

python benchmarks/serving/read_gguf.py FILE      counts by type, and how many differ in any bit
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import gguf
import numpy as np
import torch

from benchmarks.files import say
from trimtab.formats.gguf.read_blocks import GRIDS, from_blocks


def main() -> None:
    """The command."""
    kinds, left, differing = Counter[str](), Counter[str](), []
    for tensor in gguf.GGUFReader(sys.argv[1]).tensors:
        if tensor.tensor_type not in GRIDS or len(tensor.shape) != 2:
            left[tensor.tensor_type.name] += 1
            continue
        kinds[tensor.tensor_type.name] += 1
        ours = from_blocks(tensor.data, tensor.tensor_type, int(tensor.shape[1])).dequantize(torch.float32).numpy()
        if not np.array_equal(ours, gguf.quants.dequantize(tensor.data, tensor.tensor_type)):
            differing.append(tensor.name)
    say(f"on a grid: {dict(kinds)}; others: {dict(left)}")
    say(f"{kinds.total()} matrices, {len(differing)} differ{''.join(f' {name}' for name in differing)}")


if __name__ == "__main__":
    main()
