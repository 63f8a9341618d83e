"""Time of each kernel beside what a copy of the same bytes takes on the device, and beside bitsandbytes.

A layer of 4096 x 4096, bfloat16, 4 bits. `share_of_copy` is the time of a copy that moves as many bytes as the kernel must
read and write, over the kernel's time: 1 is as fast as memory allows.

python benchmarks/gpu/run.py kernels
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.gpu.device import Rows, arguments, seconds
from trimtab.kernels import channel, dequantize, shifted
from trimtab.layers.weights import AffineWeight, CodebookWeight, quantize
from trimtab.quant.grid import CodebookGrid, Grid

GRIDS: dict[str, Grid | CodebookGrid] = {
    "int4 g64": Grid(4, 64),
    "int4 g32 real": Grid(4, 32, "real"),
    "int4 channel": Grid(4, None),
    "int3 g64 integer": Grid(3, 64, "integer"),
    "nf4 g64 double": CodebookGrid("nf4", 64, True),
}
LEVELS = {"channel": Grid(4, None), "g128": Grid(4, 128), "g32": Grid(4, 32)}
RANK = 32


class Bench:
    """The sizes and the speed of memory."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.size, self.tokens = device, 256 if tiny else 4096, 64 if tiny else 4096
        self.rounds = 3 if tiny else 30
        numbers = torch.empty((1 << 20) if tiny else (1 << 28), dtype=torch.bfloat16, device=device)
        to = torch.empty_like(numbers)
        self.bytes_per_second = 2 * numbers.nbytes / self.time(lambda: to.copy_(numbers))

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds of a call."""
        return seconds(call, self.device, self.rounds)

    def row(self, call: Callable[[], Any], moved: int) -> dict[str, Any]:
        """Its time, and how near it is to what memory allows."""
        took = self.time(call)
        return {"microseconds": took * 1e6, "bytes": moved, "share_of_copy": moved / self.bytes_per_second / took}

    def weight(self, grid: Grid | CodebookGrid, storage: str = "int") -> AffineWeight | CodebookWeight:
        """A random layer."""
        torch.manual_seed(0)
        made = quantize(torch.randn(self.size, self.size), grid, storage)  # type: ignore[arg-type]
        return made.to(self.device)

    def dequantize(self, grid: Grid | CodebookGrid) -> dict[str, Any]:
        """The whole matrix."""
        weight = self.weight(grid)
        out = 2 * self.size**2
        return self.row(lambda: weight.dequantize(torch.bfloat16, reuse=True), out + weight.stored_bytes())

    def token(self, grid: Grid | CodebookGrid, rows: int) -> dict[str, Any]:
        """x W^T of a few rows, beside the dense product."""
        weight, x = self.weight(grid), torch.randn(rows, self.size, device=self.device).bfloat16()
        dense = weight.dequantize(torch.bfloat16)
        found = self.row(lambda: weight.product_of_few(x), weight.stored_bytes())
        return {**found, "dense_microseconds": self.time(lambda: x @ dense.t()) * 1e6}

    def levels(self, grid: Grid, what: str) -> dict[str, Any]:
        """LR-QAT's weight, its codes, or its gradients."""
        weight = self.weight(grid, "fixed8")
        assert isinstance(weight, AffineWeight)
        a, b = torch.randn(RANK, self.size), torch.randn(self.size, RANK) / 1000
        about = weight.described(weight.range(), (a.to(self.device), b.to(self.device)), 1.0, True)
        read, n = weight.stored_bytes() + 2 * 4 * RANK * self.size, self.size
        if what == "gradients":
            grad, sums = torch.randn(n, n, device=self.device).bfloat16(), torch.empty_like(about.scale_NG)
            return self.row(lambda: dequantize.level_gradients(grad, sums, None, *about), read + 4 * n * n)
        if what == "no dL/dW":
            return self._channel(about)
        out = torch.empty(n, n, dtype=torch.uint8 if what == "codes" else torch.bfloat16, device=self.device)
        return self.row(lambda: dequantize.levels(out, *about), read + out.nbytes)

    def _channel(self, about: Any) -> dict[str, Any]:
        """W again and all gradients of a layer both ways; the input's gradient apart."""
        g, x, y = (torch.randn(self.tokens, self.size, device=self.device).bfloat16() for _ in range(3))
        out = torch.empty(self.size, self.size, dtype=torch.bfloat16, device=self.device)
        clipped = channel.weight_and_clipped(about, out)

        def without() -> None:
            channel.gradients(about, g, x, y, channel.weight_and_clipped(about, out))

        def formed() -> None:
            dequantize.levels(out, *about)
            shifted.gradients(about, g.t() @ x)

        entries = channel.clipped_entries(clipped.cpu()) if isinstance(clipped, torch.Tensor) else clipped
        share = len(entries[0]) / self.size**2
        return {
            "microseconds": self.time(without) * 1e6,
            "formed_microseconds": self.time(formed) * 1e6,
            "clipped_share": share,
            "tokens": self.tokens,
        }

    def bitsandbytes(self) -> dict[str, Any]:
        """Its NF4 dequantization of the same matrix, and its product of one row."""
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(
            torch.randn(self.size, self.size, device=self.device).bfloat16(),
            quant_type="nf4",
            compress_statistics=True,
        )
        moved = codes.nbytes + 2 * self.size**2
        found = self.row(lambda: functional.dequantize_4bit(codes, state), moved)
        x = torch.randn(1, self.size, device=self.device).bfloat16()
        if self.device != "cpu":
            one = self.time(lambda: functional.gemv_4bit(x, codes.t(), state=state))
            found["one_row_microseconds"] = one * 1e6
        return found


def main() -> int:
    """Write the section."""
    args = arguments(__doc__)
    rows, bench = Rows(args), Bench(args.device, args.tiny)
    rows.add("copy", lambda: {"gigabytes_per_second": bench.bytes_per_second / 1e9})
    for name, grid in GRIDS.items():
        rows.add(f"weight {name}", lambda grid=grid: bench.dequantize(grid))
        for t in (1, 4):
            rows.add(f"{t} rows {name}", lambda grid=grid, t=t: bench.token(grid, t))
    for name, grid in LEVELS.items():
        for what in ("weight", "codes", "gradients", *(["no dL/dW"] if name == "channel" else [])):
            rows.add(f"levels {name}: {what}", lambda grid=grid, what=what: bench.levels(grid, what))
    rows.add("bitsandbytes nf4", bench.bitsandbytes)
    return rows.failed


if __name__ == "__main__":
    sys.exit(main())
