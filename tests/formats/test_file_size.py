"""Predicted bytes against files on disk and live tensors, over random rules, methods and models."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
)

from skeletons import CONFIGS, skeleton
from trimtab.errors import UserError
from trimtab.formats import file_size as storage
from trimtab.formats.file_size import file_size, layer_bytes, parse_bytes
from trimtab.formats.native.write import save
from trimtab.methods import Lora, LrQat, Peqa, QaBlora, QaHira, Qat, QBara, Qlora, Rtn
from trimtab.models.prepare import fold, prepare
from trimtab.models.simulate import rounding, simulate
from trimtab.models.targets import targets
from trimtab.models.transformers_bridge import cast_floats
from trimtab.quant.activations import Activations
from trimtab.recipe.rules import parse_rules

AFFINE = st.fixed_dictionaries(
    {
        "bits": st.integers(1, 8),
        "group": st.sampled_from([16, 32, None]),
        "zero": st.sampled_from(["integer", "real"]),
        "scale_dtype": st.sampled_from(["portable", "float16", "float32"]),
    }
)
TABLE = st.fixed_dictionaries(
    {"codebook": st.sampled_from(["nf4", "nf3", "fp4"]), "group": st.just(32), "double_quant": st.booleans()}
)
# Methods with the grids that they take.
METHODS = [
    (Rtn(), st.one_of(AFFINE, TABLE)),
    (LrQat(rank=2), AFFINE),
    (LrQat(rank=2, storage="bf16"), AFFINE),
    (Qat(), AFFINE),
    (Peqa(), AFFINE),
    (QaHira(), st.one_of(AFFINE, TABLE)),
    (QaBlora(rank=2), AFFINE),
    (Qlora(rank=2), st.one_of(AFFINE, TABLE)),
    (QBara(rank=2), TABLE),
    (Lora(rank=3), st.just("float")),
]
PATTERNS = ["model.layers.0.*", "*.q_proj", "*.layers.1.mlp.*", "*.o_proj"]


@st.composite
def configurations(draw: st.DrawFn) -> tuple[Any, ...]:
    method, grids = draw(st.sampled_from(METHODS))
    rules = [{"match": p, "grid": draw(st.one_of(grids, st.none()))} for p in draw(st.permutations(PATTERNS))[:2]]
    if draw(st.booleans()):
        rules.insert(0, {"match": "model.embed_tokens", "grid": draw(st.one_of(AFFINE, TABLE))})
    rules.append({"match": "*", "grid": draw(grids)})
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    modes = st.sampled_from([None, Activations(8, True, "static"), Activations(4, False, "static")])
    rounded = draw(modes)
    # An output adapter beside rounded inputs is not merged: `fold` refuses it.
    merge = rounded is None and draw(st.booleans())
    return draw(st.sampled_from(CONFIGS)), method, rules, dtype, merge, rounded


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given=configurations())
def test_predicted_bytes_are_those_on_disk(given: Any, tmp_path: Path) -> None:
    config, method, rules, dtype, merge, rounded = given
    found = file_size(skeleton(config), method, parse_rules(rules), dtype=dtype, merge=merge, activations=rounded)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    prepare(model, method, rules)
    if rounded is not None and rounding(model):
        simulate(model, activations=rounded, calibration=torch.arange(32).view(2, 16))
    fold(model, merge=merge)
    save(model, tmp_path / "out")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) == found.file_bytes
    markers = sum(name.endswith(".weight") and t.dtype == torch.uint8 for name, t in model.state_dict().items())
    assert sum(p.nbytes for p in model.parameters()) + markers == found.tensor_bytes
    # The bound is never less, and never more by more than the digits of offsets, a byte of frames and the padding.
    tensors = len(model.state_dict()) + 1
    assert found.file_bytes <= found.bound <= found.file_bytes + (2 * 11 + 1) * tensors + 8
    # It adds up: each layer's part is known without the others.
    laid_out = skeleton(config)
    cast_floats(laid_out, dtype)
    for target in targets(laid_out, method, parse_rules(rules)):
        part = layer_bytes(target, method, dtype=dtype, merge=merge, activations=rounded)
        assert part == found.parts.get(target.name, 0)
        assert (part == 0) == (target.kind == "tied")


def test_a_part_depends_on_no_other_layer() -> None:
    """Changing one layer's grid moves the sum by the difference of that layer's part."""
    eight = {"match": "*", "grid": {"bits": 8, "group": 32}}
    three = {"match": "model.layers.1.mlp.down_proj", "grid": {"bits": 3, "group": 32, "zero": "integer"}}
    a, b = (
        file_size(skeleton(CONFIGS[0]), Rtn(), parse_rules(r), dtype=torch.bfloat16) for r in ([eight], [three, eight])
    )
    moved = {name for name in a.parts if a.parts[name] != b.parts[name]}
    assert moved == {"model.layers.1.mlp.down_proj"}
    assert b.bound < a.bound
    # 5 bits less for each of 64 x 96 codes, and 3 zeros in each row, with a header entry of their own.
    codes, zeros = 64 * 96 * 5 // 8, 64 * 3
    name = "model.layers.1.mlp.down_proj.base.zero"
    header = len(storage.Entry(name, torch.uint8, (64, 3)).header(10**11 - 1, 10**11 - 1))
    assert a.bound - b.bound == codes - zeros - header - 1  # a byte for the frames of further files


@pytest.mark.parametrize("largest", [1500, 5000, 20_000])
def test_files_that_are_split_stay_within_the_bound(
    largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SHARD_BYTES", largest)
    rules = [{"match": "*", "grid": {"bits": 3, "group": 32}}]
    found = file_size(skeleton(CONFIGS[0]), Rtn(), parse_rules(rules), dtype=torch.bfloat16)
    model = prepare(AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[0]), dtype=torch.bfloat16), Rtn(), rules)
    save(model, tmp_path / "out", max_shard_size=largest)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert found.file_bytes < sum(f.stat().st_size for f in files) <= found.bound


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("90MiB", 90 << 20),
        ("1.5GB", 1_500_000_000),
        ("6 GiB", 6 << 30),
        ("512kB", 512_000),
        ("512KiB", 512 << 10),
        ("12B", 12),
        ("1000", 1000),
        (4096, 4096),
        ("2e6", 2_000_000),
    ],
)
def test_sizes_are_parsed(text: Any, count: int) -> None:
    assert parse_bytes(text, "budget") == count


@pytest.mark.parametrize(
    "text", ["", "MiB", "90 miles", "90mb", "-3MB", "0", "nan", "inf", "1e40GB", True, None, "4 5MB"]
)
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(UserError, match=r"budget: .* size"):
        parse_bytes(text, "budget")
