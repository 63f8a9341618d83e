"""Tokens per second of generation, one sequence, of folded models against the dense bfloat16 one; operators per token.

Eight layers of a 7B model with random weights. `operators` counts what torch is called with for one token, views apart.

python benchmarks/gpu/run.py generate
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.device import Rows, arguments, seconds
from benchmarks.gpu.steps import SEVEN, TINY, float_model

GRIDS: dict[str, dict[str, Any] | None] = {
    "dense bfloat16": None,
    "int4 g64": {"bits": 4, "group": 64},
    "int4 channel": {"bits": 4, "group": None},
    "nf4 g64 double": {"codebook": "nf4", "group": 64, "double_quant": True},
}


class Operators(TorchDispatchMode):
    """Counts operators that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _row(grid: dict[str, Any] | None, device: str, tiny: bool) -> dict[str, Any]:
    import trimtab

    model = float_model(device, TINY if tiny else {**SEVEN, "num_hidden_layers": 8}).eval()
    if grid is not None:
        model = trimtab.prepare(model, trimtab.methods.make("rtn"), [{"match": "*", "grid": grid}]).to(device).eval()
    ids = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(1)).to(device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    one = ids[:, -1:]

    def token() -> None:
        model(input_ids=one, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    took = seconds(token, device, rounds=3 if tiny else 20)
    with Operators() as operators:
        token()
    return {"tokens_per_second": 1 / took, "operators": operators.count, "layers": model.config.num_hidden_layers}


def main() -> int:
    """Write the section."""
    args = arguments(__doc__)
    rows = Rows(args)
    for name, grid in list(GRIDS.items())[: 2 if args.tiny else None]:
        rows.add(name, lambda grid=grid: _row(grid, args.device, args.tiny))
    return rows.failed


if __name__ == "__main__":
    sys.exit(main())
