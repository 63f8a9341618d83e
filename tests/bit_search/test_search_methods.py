"""Widths for any method: a tuned trial of each, with sensitivities by exact divergences."""

from pathlib import Path
from typing import Any

import pytest
from test_searching import made

from trimtab import methods
from trimtab.bit_search import workers
from trimtab.errors import UserError
from trimtab.quant.grid import CodebookGrid, Grid

GRIDS: dict[str, dict[str, Any]] = {
    "affine": {"bits": 4, "group": 16, "zero": "integer"},
    "real": {"bits": 4, "group": 16, "zero": "real"},
    "table": {"codebook": "nf4", "group": 16},
}


def takes(method: type[methods.Method], grid: dict[str, Any]) -> bool:
    try:
        method().delta(CodebookGrid(**grid) if "codebook" in grid else Grid(**grid), (64, 64))
    except UserError:
        return False
    return True


CASES = [
    (method.name, form)
    for method in methods.ALL
    for form, grid in GRIDS.items()
    if method.name != "rtn" and method.grid is not None and takes(method, grid)
]


def test_the_methods_of_the_papers_are_there() -> None:
    assert {("lr-qat", "affine"), ("qa-hira", "real"), ("qlora", "table"), ("q-bara", "table")} <= set(CASES)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_search_tunes_with_any_method(name: str, form: str, tmp_path: Path) -> None:
    changes = {
        "method": {"name": name},
        "rules": [
            {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}},
            {"match": "*", "grid": GRIDS[form]},
        ],
        "train": {"batch_tokens": 64},
    }
    search = {"objective": "tuned", "steps": 1, "trials": 1, "bits": [2, 4], "sensitivity": "exact"}
    found = workers.run(made(tmp_path, changes=changes, **search))
    trials = found.ledger.trials()
    assert [t.state for t in trials] == ["complete"] * 3, [t.reason for t in trials]
    assert len({t.quality for t in trials}) == 3
    # Two layers, two widths: each is passed through from its own layer on, and the float model once before, once behind.
    assert found.ledger.noted("sensitivities")["passes"] == 2 + 2 * 1 + 2 * 0.5
