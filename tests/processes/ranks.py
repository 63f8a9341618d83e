"""What two processes do in one start: a loop by hand, then a list of recipes; `torchrun .. ranks.py cases.json`.

Each case is {"recipe": .., "resume": ..}; what each process saw of it is written to <output>-<rank>.json. What they hold of
held-out text differs: to the second one each measurement is worse than the one before.
"""

import gc
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import trimtab
from trimtab.errors import UserError
from trimtab.models.decoder import blocks
from trimtab.models.sharding import Parting, is_sharded
from trimtab.training.held_out import HeldOut


def by_hand(folder: Path, rules: Any, out: Path) -> None:
    """A loop of one's own, on what every process has alike; sharded where there are several."""
    method = trimtab.methods.LrQat(rank=4, alpha=64.0)
    torch.manual_seed(0)
    model, tokenizer = trimtab.load(folder, method, rules=rules, dtype=torch.float32)
    if dist.is_initialized():
        trimtab.shard(model)
        assert is_sharded(model)
    train(model)
    trimtab.save(model, out, tokenizer)


def train(model: Any) -> None:
    """Three steps of a loop of one's own."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(64).view(2, 32)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def in_parts(case: dict[str, Any]) -> dict[str, Any]:
    """Load a model that is sharded while it is read, train and save it; the bytes that this process held meanwhile."""
    seen: list[int] = []
    part = Parting.block

    def watched(parting: Parting, block: torch.nn.Module) -> None:
        seen.append(live_bytes())  # all of the block is there, and nothing of it parted
        part(parting, block)

    before = live_bytes()
    Parting.block = watched  # type: ignore[method-assign]
    try:
        model, tokenizer = loaded(case, shard=True)
    finally:
        Parting.block = part  # type: ignore[method-assign]
    assert is_sharded(model)
    outside = bytes_of(model) - sum(sizes := [bytes_of(block) for block in blocks(model)])
    found = {"held": max(seen) - before, "after": live_bytes() - before, "outside": outside}
    if case["method"]:
        train(model)
    trimtab.save(model, case["out"], tokenizer)
    return {**found, "whole": bytes_of(model), "block": max(sizes)}


def loaded(case: dict[str, Any], shard: bool) -> Any:
    """The model of a case, and its tokenizer."""
    method, start = case["method"], case.get("start")
    torch.manual_seed(0)
    return trimtab.load(
        case["path"],
        trimtab.methods.make(**method) if method else None,
        rules=case["rules"],
        dtype=torch.float32,
        shard=shard,
        start=None if start is None else trimtab.Gptq(tokens=torch.tensor(start)),
    )


def by_tensor_parallelism(folder: Path) -> str:
    """What transformers' own way of parting a model is told."""
    try:
        AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    except UserError as error:
        return str(error)
    return "it was loaded"


def bytes_of(module: torch.nn.Module) -> int:
    """Of all parameters, parted or not."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def live_bytes() -> int:
    """Of all tensors that this process holds."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors if not x.is_meta]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in local}.values())


def of_another_mind() -> None:
    """Let this process measure a higher held-out loss each time."""
    measure, times = HeldOut.loss, itertools.count(1)
    HeldOut.loss = lambda *args: measure(*args) + next(times)  # type: ignore[method-assign]


def main(file: str) -> None:
    dist.init_process_group("gloo")
    folder = Path(file).parent
    by_hand(folder / "model", json.loads((folder / "rules.json").read_text()), folder / "by-hand")
    (folder / "tensor-parallel.txt").write_text(by_tensor_parallelism(folder / "stored"))
    if dist.get_rank():
        of_another_mind()
    for case in json.loads((folder / "in-parts.json").read_text()):
        found = in_parts(case)
        Path(f"{case['out']}-{dist.get_rank()}.json").write_text(json.dumps(found))
    for case in json.loads(Path(file).read_text()):
        recipe = case["recipe"]
        metrics = trimtab.run(recipe, resume=case.get("resume", False))
        Path(f"{recipe['output']}-{dist.get_rank()}.json").write_text(json.dumps(metrics))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
