"""Killed, or its disk full, failing or read-only, at the n-th call that changes a file: each command goes on, bit for bit.

A bounded sample; `make faults` takes a hundred points of each (docs/reliability.md).
"""

import os
from collections.abc import Iterator

import pytest

from faults import shim
from faults.asking import Asking, points
from faults.operations import OPERATIONS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(shim.MISSING), reason=shim.MISSING)]
SEED = int(os.environ.get("TRIMTAB_FAULTS_SEED", "0"))
POINTS = {"killed": 2, "full disk": 1, "read-only disk": 1}


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    with Asking(tmp_path_factory.mktemp("faults")) as started:
        yield started


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_command_that_is_disturbed_goes_on(asking: Asking, operation: str) -> None:
    calls = asking(operation)["calls"]
    assert calls > 5
    wrong = {}
    for number, (fault, wanted) in enumerate(POINTS.items()):
        for at in points(calls, wanted, seed=100 * SEED + number):
            answer = asking(operation, at, fault)
            assert answer["call"] or fault != "killed", "no fault came"
            if answer["problem"]:
                wrong[fault, at, answer["call"]] = answer["problem"]
    assert not wrong


def test_what_is_written_in_place_is_found(asking: Asking) -> None:
    """Else nothing above could fail."""
    calls = asking("careless")["calls"]
    found = [asking("careless", at, fault) for fault in ("killed", "full disk") for at in range(1, calls + 1)]
    problems = " ".join(answer["problem"] for answer in found)
    for fault in ("half-written: out: UserError", "left behind: ['beside-"):
        assert fault in problems
    assert {answer["status"] for answer in found} == {-9, 0, 2}
