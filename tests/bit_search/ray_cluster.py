"""A search on a Ray cluster of two nodes, both of this machine, whose workers are killed while they make the first trials.

A process of its own (`python ray_cluster.py FOLDER`), since Ray leaves threads and handlers behind; prints what it saw.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

import tiny
from trimtab.bit_search import workers
from trimtab.bit_search.searching import Search
from trimtab.errors import UserError
from trimtab.recipe import recipe


def values(folder: Path, **search: Any) -> dict[str, Any]:
    block = {"units": "layer", "bits": [4, 8], "trials": 2, "tokens": 64, "sensitivity_tokens": 64, "engine": "ray"}
    return tiny.recipe(folder / "m", folder / "t.jsonl", folder / "out", search=block | search)


def killed() -> int:
    """Kill every process of Ray's that is at work on a task of ours; how many these were."""
    found = [
        p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0].startswith("ray::_carried_out")
    ]
    for process in found:
        os.kill(process.pid, signal.SIGKILL)
    return len(found)


def main(folder: Path) -> None:
    tiny.model(folder / "m")
    tiny.text(folder / "t.jsonl")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"bench": 1}})
    cluster.add_node(num_cpus=1, resources={"bench": 1})
    os.environ["RAY_ADDRESS"] = cluster.address
    seen: dict[str, Any] = {"killed": 0, "said": []}

    def told(search: Search) -> None:
        if not seen["killed"] and sum(t.state == "running" for t in search.ledger.trials()) == 2:
            seen["killed"] = killed()

    used = recipe.from_dict(values(folder, resources={"cpu": 1, "bench": 0.5}))
    found = workers.run(used, told, seen["said"].append)
    seen["trials"] = [(t.state, t.reason, t.wish.configuration, t.quality, t.where) for t in found.ledger.trials()]
    objective = found.bench.objective()
    seen["here"] = [
        [c, objective(found.space.rules(c), 0)] for c in {t.wish.configuration for t in found.ledger.trials()}
    ]
    try:
        workers.run(recipe.from_dict(values(folder, resources={"gpu": 1}, trials=3)))
    except UserError as error:
        seen["refused"] = str(error)
    (folder / "seen.json").write_text(json.dumps(seen))
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
