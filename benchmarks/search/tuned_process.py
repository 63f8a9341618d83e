"""What a cell, a pruning and a search of `tuned.py` run in a process of their own; values come and go as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""What shares a width, in every layer."""


def prune(values: dict[str, Any]) -> None:
    from trimtab.pruning import Options, prune_checkpoint

    options = Options(ratio=values["ratio"], multiple_of=values["multiple_of"])
    sizes = {key: values[key] for key in ("text", "tokens", "block_tokens")}
    prune_checkpoint(values["model"], values["out"], options, **sizes)


def cell(values: dict[str, Any]) -> None:
    import trl.trainer.sft_trainer  # noqa: F401  (libraries are no part of a run's memory)

    from trimtab.memory.process import resident_bytes
    from trimtab.pipeline.run import run
    from trimtab.recipe.recipe import from_dict

    before = resident_bytes()
    metrics = run(from_dict(values), overwrite=True)
    metrics["libraries_bytes"] = before
    (Path(values["output"]) / "metrics.json").write_text(json.dumps(metrics))


def search(values: dict[str, Any]) -> None:
    """Search within the bytes of the recipe's rules; continues where an earlier process ended.

    Widths, bytes and cost, with the time that sensitivities took, go to `found.json`.
    """
    from trimtab.bit_search import workers
    from trimtab.formats.file_size import file_size
    from trimtab.models.sources import open_source
    from trimtab.recipe.recipe import from_dict

    plain = from_dict(values)
    skeleton = open_source(plain.model.path).layout()
    budget = file_size(skeleton, plain.method, plain.rules, dtype=plain.dtype).bound
    recipe = from_dict(values | {"search": values["search"] | {"budget": budget}})
    done = workers.run(recipe)
    trials = [t for t in done.ledger.trials() if t.state == "complete"]
    steps, seconds = sum(t.wish.steps for t in trials), sum(t.seconds or 0.0 for t in trials)
    cost = {"trials": len(trials), "tokens": steps * recipe.train.batch_tokens, "seconds": seconds}
    write(done, done.front(trials)[-1].wish.configuration, cost)


def write(found: Any, configuration: tuple[int, ...], cost: dict[str, Any]) -> None:
    """Widths of the parts of each layer, their bytes, and what they cost beside the sensitivities."""
    bits = dict.fromkeys(PARTS, "")
    for rule in found.space.rules(configuration):
        part = next((p for p, names in PARTS.items() if rule.match.endswith(names[0])), None)
        if part is not None:
            bits[part] += str(rule.grid.bits)
    sizes = {"bytes": found.space.bytes(configuration), "budget_bytes": found.budget}
    cost |= {"seconds": round(cost["seconds"] + found.ledger.noted("sensitivities")["seconds"], 1)}
    (found.recipe.out / "found.json").write_text(json.dumps({"widths": bits} | sizes | cost))


if __name__ == "__main__":
    does = {"prune": prune, "cell": cell, "search": search}
    does[sys.argv[1]](json.loads(sys.argv[2]))
