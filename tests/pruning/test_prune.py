"""Pruned models against autograd's own gradients, against zeroed weights, and against what transformers reads back."""

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import tiny
from trimtab import pruning as prune
from trimtab.errors import UserError
from trimtab.formats import manifest
from trimtab.pruning import Options, Widths, depth, importance, structures, widths

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA: dict[str, Any] = {"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING], "query_pre_attn_scalar": 12}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, head_dim=8, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=10),
    "gemma2": Gemma2Config(**SIZES, head_dim=12, **GEMMA, final_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=12, **GEMMA),
}
each = pytest.mark.parametrize("name", CONFIGS)
IDS = torch.arange(60).view(3, 20) % 96


def model_of(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).to(dtype).eval()
    for p in model.parameters():  # biases and norms start as constants, weights too small to matter
        p.data += 0.2 * torch.randn_like(p)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def outgoing(model: PreTrainedModel) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    return [(layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight) for layer in model.base_model.layers]


# ---- importance -----------------------------------------------------------------------------------------------------


@each
def test_taylor_is_weight_times_gradient_by_plain_autograd(name: str) -> None:
    model = model_of(name)
    about = structures.layout(model)
    groups = [torch.zeros(4, dtype=torch.float64) for _ in range(3)]
    channels = [torch.zeros(80, dtype=torch.float64) for _ in range(3)]
    for ids in IDS:
        model.zero_grad()
        F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum").backward()
        for (o, down), g, c in zip(outgoing(model), groups, channels, strict=True):
            assert o.grad is not None
            assert down.grad is not None
            g += torch.stack([part.sum() for part in (o.detach() * o.grad).chunk(4, 1)]).abs() / 3
            c += (down.detach() * down.grad).sum(0).abs() / 3
    model.zero_grad()
    found = importance.taylor(model, about, IDS, micro_batch=2)
    for scores, g, c in zip(found, groups, channels, strict=True):
        # The chunked loss takes its softmax in float32.
        torch.testing.assert_close(scores.groups, g, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(scores.channels, c, rtol=1e-4, atol=1e-6)


def test_taylor_leaves_the_model_as_it_was() -> None:
    model = model_of("llama").train()
    before = logits(model.eval())
    model.train()
    importance.taylor(model, structures.layout(model), IDS)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ for m in model.modules())
    assert torch.equal(logits(model.eval()), before)


def test_taylor_keeps_one_layer_of_activations() -> None:
    """What autograd holds between forward and backward grows by one hidden state a layer, not by a layer."""
    kept = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.nbytes)
        return t

    model = model_of("llama", torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        importance.taylor(model, structures.layout(model), IDS[:1])
    hidden = 20 * 48 * 4
    channels = 20 * 80 * 4
    # Inside the recomputed layers torch's own hooks are on top; what reaches ours is outside them.
    assert sum(kept) < 3 * hidden + 3 * channels


@each
def test_magnitude_is_the_sum_of_squares_of_all_that_goes(name: str) -> None:
    """Every weight that pruning would remove, and no other: what is lost is what the smaller model has less of."""
    model = model_of(name)
    about = structures.layout(model)
    scores = importance.score(model, about, "magnitude", None, 0)
    before = [sum(p.square().sum() for p in layer.parameters()) for layer in model.base_model.layers]
    keep_groups, keep_channels = torch.tensor([0, 2]), torch.arange(5, 40)
    for layer, total, (groups, channels) in zip(model.base_model.layers, before, scores, strict=True):
        structures.cut(layer, about, keep_groups, keep_channels)
        left = sum(p.square().sum() for p in layer.parameters())
        lost = groups[[1, 3]].sum() + channels[:5].sum() + channels[40:].sum()
        torch.testing.assert_close(total - left, lost)


# ---- widths ---------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("kind", ["taylor", "magnitude", "random"])
def test_pruned_is_the_original_with_weights_set_to_zero(name: str, kind: Any) -> None:
    model, zeroed = model_of(name), model_of(name)
    about = structures.layout(model)
    scores = importance.score(model_of(name), about, kind, IDS, 0)
    options = Options(ratio=0.4, importance=kind, multiple_of=8)
    done = prune.prune(model, options, IDS)
    size = zeroed.base_model.layers[0].self_attn.o_proj.in_features // 4
    for (o, down), (groups, channels), kept in zip(outgoing(zeroed), scores, done.kept_groups, strict=True):
        assert len(kept) == done.widths.groups
        assert set(kept) == set(groups.topk(done.widths.groups).indices.tolist())
        gone = set(range(80)) - set(channels.topk(done.widths.channels).indices.tolist())
        with torch.no_grad():
            down[:, sorted(gone)] = 0
            for i in set(range(4)) - set(kept):
                o[:, i * size : (i + 1) * size] = 0
    torch.testing.assert_close(logits(model), logits(zeroed), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(logits(model), logits(model_of(name)))


@each
@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5])
@pytest.mark.parametrize("count_embeddings", [False, True])
def test_at_least_the_ratio_is_removed(name: str, ratio: float, count_embeddings: bool) -> None:
    model = model_of(name)
    all_ = sum(p.numel() for p in model.parameters())
    ends = {p for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    counted = all_ if count_embeddings else all_ - sum(p.numel() for p in ends)
    options = Options(ratio=ratio, importance="magnitude", count_embeddings=count_embeddings, multiple_of=8)
    done = prune.prune(model, options)
    left = sum(p.numel() for p in model.parameters())
    assert (done.parameters_before, done.parameters) == (all_, left)
    # No more than a row of multiples beyond it.
    spare = 3 * 8 * structures.layout(model).channel_parameters
    assert ratio * counted <= all_ - left < ratio * counted + spare
    assert done.widths.channels % 8 == 0 or done.widths.channels == 80


def test_embeddings_count_only_where_asked() -> None:
    left = [
        prune.prune(model_of("llama"), Options(ratio=0.3, importance="random", count_embeddings=c, multiple_of=4))
        for c in (False, True)
    ]
    assert left[0].parameters > left[1].parameters


def test_a_byte_target_is_kept(tmp_path: Path) -> None:
    """By the file."""
    model = model_of("qwen2", torch.bfloat16)
    target = int(0.7 * sum(p.nbytes for p in model.parameters()))
    prune.prune(model, Options(target_bytes=target, importance="magnitude", multiple_of=1))
    model.save_pretrained(tmp_path)
    assert 0.97 * target < (tmp_path / "model.safetensors").stat().st_size <= target
    large = Options(target_bytes=1 << 30, importance="magnitude")
    done = prune.prune(model_of("qwen2"), large)
    assert done.parameters == done.parameters_before


@pytest.mark.parametrize("keep", [(0,), (2,)])
def test_kept_layers_decide_the_widths(keep: tuple[int, ...]) -> None:
    """Layer 0 lives by its attention, layer 2 by its MLP: the one that is kept is spared the cut that hurts it."""
    model = model_of("mistral")
    with torch.no_grad():
        for layer, (attention, mlp) in zip(model.base_model.layers, ((9, 0.1), (1, 1), (0.1, 9)), strict=True):
            layer.self_attn.o_proj.weight *= attention
            layer.mlp.down_proj.weight *= mlp
    done = prune.prune(model, Options(ratio=0.3, importance="magnitude", multiple_of=4, keep=keep))
    assert (done.widths.groups == 4) == (keep == (0,))
    assert len({layer.mlp.down_proj.in_features for layer in model.base_model.layers}) == 1


def test_kept_layers_decide_by_measured_loss() -> None:
    """As above, by Taylor: only what the kept layer gives up is silenced, and its scores are never compared."""
    model, about = model_of("mistral"), structures.layout(model_of("mistral"))
    scores = importance.taylor(model, about, IDS)
    options = Options(ratio=0.3, multiple_of=4, keep=(0,))
    counted = about.parameters - about.embedding_parameters
    losses = {}
    for pair in widths.pairs(model.config, about, -int(-0.3 * counted // 1), 4):
        other = copy.deepcopy(model)
        lost = [
            s.argsort(stable=True)[: len(s) - n] for s, n in zip(scores[0], (pair.groups, pair.channels), strict=True)
        ]
        o, down = outgoing(other)[0]
        size = about.heads_per_group * about.head_dim
        o.data.unflatten(1, (-1, size))[:, lost[0]] = 0
        down.data[:, lost[1]] = 0
        losses[pair] = other(input_ids=IDS, labels=IDS, use_cache=False).loss.item()
    assert len(losses) > 1
    assert prune.prune(model, options, IDS).widths == min(losses, key=losses.__getitem__)


def test_qwen2_keeps_its_heads() -> None:
    """vLLM and mlx-lm compute its head_dim from hidden size and heads."""
    about = structures.layout(model_of("qwen2"))
    assert [w.groups for w in widths.pairs(CONFIGS["qwen2"], about, 100, 4)] == [4]


def test_widths_are_in_whole_groups() -> None:
    """Channels always, and what o reads where heads go: a group of 16 takes two of 2 x 6 inputs, or four."""
    config = MistralConfig(**SIZES, head_dim=6)
    about = structures.layout(AutoModelForCausalLM.from_config(config))
    found = widths.pairs(config, about, 100, 8)
    assert [w.groups for w in found] == [4, 2]
    assert all(w.channels % 8 == 0 for w in found)
    assert widths.pairs(config, about, 0, 64) == [about.widths]


def test_overflow_is_refused() -> None:
    model = model_of("llama", torch.float16)
    model.base_model.layers[1].mlp.up_proj.weight.data *= 3e4
    for options, what in ((Options(ratio=0.3, multiple_of=4), "layer"), (Options(layers=1), "influence")):
        with pytest.raises(UserError, match=f"{what}.* is not finite.*--dtype"):
            prune.prune(copy.deepcopy(model), options, IDS)


def test_llama_keeps_heads_that_divide_its_hidden_size() -> None:
    """transformers refuses other Llama configs: 3 heads do not divide 32."""
    config = LlamaConfig(**{**SIZES, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4})
    model = AutoModelForCausalLM.from_config(config)
    about = structures.layout(model)
    assert [w.groups for w in widths.pairs(config, about, 100, 4)] == [4, 2, 1]


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_the_split_is_the_one_of_least_loss(name: str) -> None:
    """Measured with structures silenced; here every pair is cut in full and its loss taken by transformers."""
    model, losses = model_of(name), {}
    about = structures.layout(model)
    scores = importance.taylor(model, about, IDS)
    options = Options(ratio=0.3, multiple_of=4)
    counted = about.parameters - about.embedding_parameters
    for pair in widths.pairs(model.config, about, -int(-0.3 * counted // 1), 4):
        other = copy.deepcopy(model)
        kept = [
            (s.groups.topk(pair.groups).indices.sort().values, s.channels.topk(pair.channels).indices.sort().values)
            for s in scores
        ]
        gone = [
            (outside(g, len(s.groups)), outside(c, len(s.channels))) for (g, c), s in zip(kept, scores, strict=True)
        ]
        for layer, (groups, channels) in zip(other.base_model.layers, kept, strict=True):
            structures.cut(layer, about, groups, channels)
        other.config = widths.describe(other.config, about, pair)
        with torch.no_grad():
            losses[pair] = other(input_ids=IDS, labels=IDS).loss.item()
        assert importance.loss_without(model, gone, about, IDS) == pytest.approx(losses[pair], rel=1e-6)
    assert len(losses) > 1
    assert prune.prune(model, options, IDS).widths == min(losses, key=lambda w: losses[w])


def outside(kept: torch.Tensor, count: int) -> torch.Tensor:
    return torch.tensor([i for i in range(count) if i not in set(kept.tolist())], dtype=torch.int64)


# ---- files ----------------------------------------------------------------------------------------------------------


@each
def test_from_pretrained_reads_what_was_pruned(name: str, tmp_path: Path) -> None:
    model = model_of(name, torch.float32)
    done = prune.prune(model, Options(ratio=0.4, importance="magnitude", multiple_of=8))
    prune.save(model, tmp_path / "out", tiny.tokenizer(), {})
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_key_value_heads"] == done.widths.groups
    assert config["num_attention_heads"] == 2 * done.widths.groups
    assert config["head_dim"] == again.base_model.layers[0].self_attn.head_dim
    kinds = (".json", ".safetensors", ".jinja", ".md")
    assert not [f.name for f in (tmp_path / "out").iterdir() if f.suffix not in kinds]
    generated = again.generate(IDS[:1, :4], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(IDS[:1, :4], max_new_tokens=4, min_new_tokens=4, do_sample=False))


def test_a_checkpoint_in_a_checkpoint_out(tmp_path: Path) -> None:
    tiny.model(tmp_path / "model")
    tiny.text(tmp_path / "text.jsonl")
    options = Options(ratio=0.3, multiple_of=8)
    done = prune.prune_checkpoint(
        str(tmp_path / "model"),
        tmp_path / "out",
        options,
        text=str(tmp_path / "text.jsonl"),
        tokens=256,
        block_tokens=64,
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert sum(p.numel() for p in again.parameters()) == done.parameters
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["options"]["ratio"] == 0.3
    assert manifest.verify(tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []
    assert (tmp_path / "out").stat().st_mode & 0o777 == (tmp_path / "model").stat().st_mode & 0o777
    with pytest.raises(UserError, match="remove it or name another"):
        prune.prune_checkpoint(str(tmp_path / "model"), tmp_path / "out", options)


# ---- whole layers ---------------------------------------------------------------------------------------------------


@each
def test_dropped_layers_are_those_of_least_influence(name: str, tmp_path: Path) -> None:
    model = model_of(name, torch.float32)
    with torch.no_grad():
        states = model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
    last: list[torch.Tensor] = []
    hook = model.base_model.layers[-1].register_forward_hook(
        lambda m, i, o: last.append(o[0] if isinstance(o, tuple) else o)
    )
    expected_logits = logits(model)
    hook.remove()
    states = [*states[:-1], last[0]]  # the last of transformers' is normed
    cosines = [F.cosine_similarity(a, b, dim=-1).mean().item() for a, b in pairwise(states)]
    influences = depth.influence(model, IDS, micro_batch=2)
    assert influences == pytest.approx([1 - c for c in cosines], abs=1e-5)
    assert torch.equal(logits(model), expected_logits)
    least = min(range(3), key=lambda i: influences[i])
    done = prune.prune(model, Options(layers=1), IDS)
    assert done.dropped_layers == (least,)
    prune.save(model, tmp_path / "out", None, {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert len(again.base_model.layers) == again.config.num_hidden_layers == 2
    # With a cache, which goes by the layers' numbers.
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(IDS[:1, :9], **options), model.generate(IDS[:1, :9], **options))


@each
def test_layers_that_stay_are_numbered_anew(name: str) -> None:
    """A cache goes by these numbers."""
    model = model_of(name)
    depth.drop(model, [0])
    assert [layer.self_attn.layer_idx for layer in model.base_model.layers] == [0, 1]


def test_layers_for_a_ratio_and_kept_ones() -> None:
    model = model_of("llama")
    free = min((0, 2), key=lambda i: depth.influence(model, IDS)[i])
    done = prune.prune(model, Options(ratio=0.3, what="layers", keep=(1, 2 - free)), IDS)
    assert done.dropped_layers == (free,)
    assert done.widths == done.widths_before == Widths(4, 80)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"ratio": 0.2, "layers": 1}, "exactly one"),
        ({"ratio": 30}, "between 0 and 1"),
        ({"layers": 0}, "at least 1"),
        ({"ratio": 0.2, "multiple_of": 0}, "positive"),
        ({"ratio": 0.2, "what": "heads"}, "none of widths, layers"),
        ({"ratio": 0.2, "importance": "fisher"}, "none of taylor"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Options(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(ratio=0.98, importance="magnitude", multiple_of=8), "cannot remove"),
        (Options(ratio=0.2, multiple_of=8), "calibration text"),
        (Options(layers=1), "calibration text"),
        (Options(ratio=0.2, importance="random", keep=(3,)), "no layer 3"),
    ],
)
def test_what_cannot_be_done(options: Options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune.prune(model_of("llama"), options)


def test_all_layers_cannot_go() -> None:
    with pytest.raises(UserError, match="one must be left"):
        prune.prune(model_of("llama"), Options(layers=3), IDS)


def test_unknown_parts_are_refused() -> None:
    from transformers import GPT2Config, Olmo2Config

    with pytest.raises(UserError, match=r"q_norm\.weight"):
        structures.layout(AutoModelForCausalLM.from_config(Olmo2Config(**SIZES, pad_token_id=0)))
    with pytest.raises(UserError, match="Llama-like"):
        structures.layout(AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)))
