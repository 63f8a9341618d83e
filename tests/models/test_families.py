"""A float model is loaded as transformers loads it, bit for bit, in every causal family that transformers knows."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
from trimtab.models.load import load_float

EACH = [
    pytest.param(name, marks=pytest.mark.xfail(reason=families.NOT_BUILT[name], strict=True))
    if name in families.NOT_BUILT
    else name
    for name in families.families()
]


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Loading collects garbage, which takes long where all of transformers is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("model_type", EACH)
def test_loading_is_exactly_transformers(model_type: str, tmp_path: Path) -> None:
    """Checkpoints whose names or layouts transformers converts (GPT-NeoX's head, fused experts, text and vision)."""
    path = families.write(model_type, tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16):
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        ours = load_float(str(path), dtype=dtype)
        assert not families.differences(ours, theirs)
        if dtype == torch.float32:
            expected = families.logits(theirs)
            assert expected.isfinite().all()
            assert torch.equal(families.logits(ours), expected)


def test_no_family_is_left_out() -> None:
    assert families.NOT_BUILT.keys() <= set(families.families())
    assert families.NOT_BUILT_TO_SEE.keys() <= set(families.seeing())
    assert families.EXCEPTIONS.keys() <= {*families.families(), *families.seeing()}


def test_the_page_has_a_row_for_every_family() -> None:
    """docs/families.md, written by `tools/families.py` from the same models."""
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8").partition("\n## ")[0]
    rows = dict(line.strip("| ").split(" | ", 1) for line in page.splitlines() if line.startswith("| "))
    del rows["family"]
    assert list(rows) == families.families(), "run: python tools/families.py"
    assert rows == {
        name: f"not tried: {families.NOT_BUILT[name]}" if name in families.NOT_BUILT else "yes" for name in rows
    }
