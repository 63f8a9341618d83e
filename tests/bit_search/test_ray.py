"""A search whose trials are tasks of a Ray cluster of two nodes."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from trimtab import extras
from trimtab.bit_search.ledger import DIED
from trimtab.errors import UserError
from trimtab.pipeline.checks import check_extras
from trimtab.recipe import recipe

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'trimtab[ray]'")
def test_a_cluster_of_two_whose_workers_are_killed(tmp_path: Path) -> None:
    """Each killed trial is a dead one, made again; values are those of this process; no room is said at once."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(Path(__file__).with_name("ray_cluster.py")), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["said"][0] == "Ray: 2 machines, room for 2 trials at a time"
    states = [state for state, *_ in seen["trials"]]
    assert seen["killed"] >= 1
    assert states.count("dead") == seen["killed"]
    assert {reason for state, reason, *_ in seen["trials"] if state == "dead"} == {DIED}
    assert states.count("complete") == 4
    here = {tuple(configuration): quality for configuration, quality in seen["here"]}
    for state, _, configuration, quality, where in seen["trials"]:
        if state == "complete":
            assert quality == pytest.approx(here[tuple(configuration)], rel=1e-5)
            assert where.endswith(" cpu")
    assert seen["refused"].startswith(
        "search.resources: no machine of the Ray cluster has what a trial needs (CPU 1, GPU 1); they have: CPU 1, GPU 0; "
    )


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"model": {"path": "x", "device": "cpu"}, "method": "rtn", "data": "t.jsonl", "train": {"steps": 0}}
    used = recipe.from_dict(values | {"search": {"engine": "ray"}, "rules": [{"match": "*", "grid": {"bits": 4}}]})
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    with pytest.raises(UserError, match=r"this recipe needs ray, not installed here: pip install 'trimtab\[ray\]'"):
        check_extras(used)
