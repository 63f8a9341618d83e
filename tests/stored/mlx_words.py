"""Makes `mlx_words.safetensors`: random codes, and the words that MLX's own quantizer packs them in.

    MLX_PYTHON tests/stored/mlx_words.py        needs mlx, numpy and safetensors only; stored with mlx 0.32.4

Rows run through every code, and their ends are those of the grid, so that quantizing w = s c + b gives back c itself.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors.numpy import save_file

N, K, GROUP = 4, 64, 32


def main() -> None:
    """Write the file."""
    rng, stored = np.random.default_rng(0), {}
    for bits in (2, 3, 4, 5, 6, 8):
        codes = rng.integers(0, 2**bits, (N, K // GROUP, GROUP))
        codes[..., 0], codes[..., 1] = 0, 2**bits - 1
        weight = 2.0**-4 * (codes - 2 ** (bits - 1))
        words, scales, biases = mx.quantize(mx.array(weight.reshape(N, K).astype(np.float32)), GROUP, bits)
        read = np.array(mx.dequantize(words, scales, biases, GROUP, bits))
        # MLX may count from the other end of the range: what it read says which codes its words hold.
        s, b = (np.repeat(np.array(x), GROUP, 1) for x in (scales, biases))
        held = np.rint((read - b) / s).astype(np.uint8)
        stored |= {f"{bits}.codes": held, f"{bits}.words": np.array(words)}
    save_file(stored, Path(__file__).with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
