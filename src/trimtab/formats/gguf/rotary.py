"""Rotary embeddings between a file's keys and a config, each turned into frequencies that the other is held against.

llama.cpp turns the keys of a file into d / 2 frequencies and a factor of cosine and sine,

    f_i = b^(-2 i / d) / c_i        b `rope.freq_base`, c the tensor `rope_freqs.weight` (longrope: `rope_factors_short`)
    linear    f_i / s                 s `rope.scaling.factor`; linear is also what a file without a type has
    yarn      f_i ((1 - r_i) / s + r_i)       r_i = 1 - clamp((i - low) / (high - low), 0, 1)
              low, high = floor, ceil of d ln(n / (2 pi t)) / (2 ln b) at t = 32 and 1    n the original context
    factor    `rope.scaling.attn_factor`, under yarn times 1 + 0.1 ln s

and transformers turns `rope_parameters` into the same. Names differ and each side has settings that the other lacks (for
the families written here llama.cpp reads no key of yarn's but these). So nothing is trusted by its name: a config and a set
of keys belong together if the frequencies do, in reading as in writing (`settings.require_agreement`).

Llama 3's scaling is in a file only by its result c. Its parameters are found again from that, and are right if they give c.

Legend: d rotated dimensions of a head.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

FREQS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
TENSORS = (FREQS, SHORT, LONG)
"""Tensors of a file that are no parameter: what frequencies are divided by."""
_STILL = 1e-20
"""Radians a position that turn nothing over any context."""
_BETA_FAST, _BETA_SLOW = 32, 1


class Frequencies(NamedTuple):
    """What a head's pairs of dimensions are rotated by."""

    inverse: Tensor
    """Radians a position, float64 (d / 2,)."""
    factor: float
    """Of cosine and sine."""

    def equals(self, other: "Frequencies") -> bool:
        """Up to the rounding of float32."""
        if self.inverse.shape != other.inverse.shape or not math.isclose(self.factor, other.factor, rel_tol=1e-4):
            return False
        return torch.allclose(self.inverse, other.inverse, rtol=1e-4, atol=_STILL)


def of_keys(keys: Mapping[str, Any], factors: Mapping[str, Tensor], rotated: int, *, windowed: bool) -> Frequencies:
    """What llama.cpp computes from a file.

    Args:
        keys: of the file's architecture, by what follows its name.
        factors: those of `TENSORS` that the file has.
        rotated: d.
        windowed: of layers with a sliding window that have a base of their own.
    """
    base = float(keys.get("rope.freq_base_swa" if windowed else "rope.freq_base", 10000.0))
    inverse = base ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    factor = float(keys.get("rope.scaling.attn_factor", 1.0))
    if windowed:  # never scaled
        return Frequencies(inverse, factor)
    kind, scale = scaling(keys, factors)
    divisors = factors.get(SHORT if kind == "longrope" else FREQS)
    if divisors is not None:
        inverse = inverse / divisors.double()
    if kind == "yarn":
        kept = 1 - _ramp(base, rotated, int(original_context(keys)))
        return Frequencies(inverse * ((1 - kept) / scale + kept), factor * (1 + 0.1 * math.log(scale)))
    return Frequencies(inverse / scale, factor)


def scaling(keys: Mapping[str, Any], factors: Collection[str] = ()) -> tuple[str, float]:
    """Type and factor of a file's scaling: `none` and 1 where it has none. Phi-3's files say longrope by its tensors."""
    if SHORT in factors and "rope.scaling.type" not in keys:
        return "longrope", 1.0
    kind = str(keys.get("rope.scaling.type", "linear"))
    scale = float(keys.get("rope.scaling.factor") or keys.get("rope.scale_linear") or 1.0)
    return ("none", 1.0) if kind == "none" or (kind == "linear" and scale == 1) else (kind, scale)


def original_context(keys: Mapping[str, Any]) -> int:
    """Tokens that the model was trained on before its context was extended."""
    return int(keys.get("rope.scaling.original_context_length", keys.get("context_length", 0)))


def _ramp(base: float, rotated: int, context: int) -> Tensor:
    def dimension(turns: int) -> float:
        return rotated * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(0, math.floor(dimension(_BETA_FAST))), min(rotated - 1, math.ceil(dimension(_BETA_SLOW)))
    i = torch.arange(rotated // 2, dtype=torch.float64)
    return ((i - low) / max(0.001, high - low)).clamp(0, 1)


def of_model(model: Any) -> dict[str, Frequencies]:
    """What a model of transformers rotates by: of all layers under "", or of each kind of layer.

    Its modules are made again from their config, since a cast of the model rounds their buffers.
    """
    found: dict[str, Frequencies] = {}
    for module in model.modules():
        if hasattr(module, "compute_default_rope_parameters") and hasattr(module, "config"):
            fresh = type(module)(config=module.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                kind = name.removesuffix("inv_freq").removesuffix("_")
                if name.endswith("inv_freq") and not kind.endswith("original"):
                    factor = getattr(fresh, f"{kind}_attention_scaling".lstrip("_"))
                    found[kind] = Frequencies(buffer.double().cpu(), float(factor))
    return found


def parameters(keys: Mapping[str, Any], factors: Mapping[str, Tensor], rotated: int) -> dict[str, Any] | None:
    """transformers' `rope_parameters` of a file; None where none of its types has these frequencies."""
    base, (kind, scale) = float(keys.get("rope.freq_base", 10000.0)), scaling(keys, factors)
    found: dict[str, Any] = {"rope_theta": base, "rope_type": "default" if kind == "none" else kind}
    attention = float(keys.get("rope.scaling.attn_factor", 1.0))
    if kind == "longrope":
        if SHORT not in factors or LONG not in factors:
            return None
        found |= {"short_factor": factors[SHORT].tolist(), "long_factor": factors[LONG].tolist()}
        return found | {"original_max_position_embeddings": original_context(keys), "attention_factor": attention}
    if kind == "yarn":
        found |= {"factor": scale, "original_max_position_embeddings": original_context(keys)}
        found |= {} if attention == 1 else {"attention_factor": attention * (1 + 0.1 * math.log(scale))}
    elif kind == "linear":
        found["factor"] = scale
    divisors = factors.get(FREQS)
    if divisors is None or bool((divisors == 1).all()):
        return found if kind in ("none", "linear", "yarn") else None
    if kind != "none":
        return None
    if bool((divisors == divisors[0]).all()):
        return found | {"rope_type": "linear", "factor": float(divisors[0])}
    llama3 = _llama3(divisors.double(), base, rotated, keys.get("rope.scaling.original_context_length"))
    return None if llama3 is None else found | {"rope_type": "llama3", **llama3}


def llama3_divisors(full: Mapping[str, Any], rotated: int) -> Tensor:
    """What Llama 3's scaling divides each frequency by: float64 (d / 2,).

    Low frequencies by `factor`, high ones by 1, those between by a blend; the equation is Llama 3's.
    """
    wavelength = 2 * math.pi * full["rope_theta"] ** (torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    old, low, high = full["original_max_position_embeddings"], full["low_freq_factor"], full["high_freq_factor"]
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / full["factor"] + smooth)


def _llama3(divisors: Tensor, base: float, rotated: int, context: int | None) -> dict[str, Any] | None:
    """Parameters of Llama 3's scaling that give these divisors: its own factors first, then those that the blend shows."""
    factor = float(f"{divisors.max().item():.6g}")
    usual = [n for n in (context, 8192, *(1 << i for i in range(4, 21))) if n]
    tried = [(1.0, 4.0, int(n)) for n in usual]
    line = _blend(
        divisors, factor, base ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated) / (2 * math.pi)
    )
    if line is not None:
        slope, below = line
        for old in (*([context] if context else []), max(1, round(slope / below))):
            low, high = below * old / slope, (1 + below) * old / slope
            tried += [(float(f"{low:.{n}g}"), float(f"{high:.{n}g}"), int(old)) for n in (6, 12)]
    for low, high, old in tried:
        found = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        found["original_max_position_embeddings"] = old
        if torch.allclose(llama3_divisors({**found, "rope_theta": base}, rotated), divisors, rtol=1e-5, atol=0):
            return found
    return None


def _blend(divisors: Tensor, factor: float, turns: Tensor) -> tuple[float, float] | None:
    """The blend's slope and depth: it is a line in turns a position, old / (high - low) steep, low / (high - low) below 0.

    One frequency inside it leaves the line free to turn about that point: the flattest is taken that keeps the others out.
    """
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    inside = ((smooth > 1e-4) & (smooth < 1 - 1e-4)).nonzero().flatten().tolist()
    if not inside:
        return None
    first, last = inside[0], inside[-1]
    if first != last:
        columns = torch.stack([turns[inside], -torch.ones(len(inside), dtype=torch.float64)], 1)
        slope, below = torch.linalg.lstsq(columns, smooth[inside, None]).solution[:, 0].tolist()
    else:
        above = (1 - smooth[first]) / (turns[first - 1] - turns[first]) if first else torch.zeros(())
        under = smooth[first] / (turns[first] - turns[first + 1]) if first + 1 < len(turns) else torch.zeros(())
        slope = max(above.item(), under.item()) * (1 + 1e-9)
        below = slope * turns[first].item() - smooth[first].item()
    return (slope, below) if slope > 0 and below > 0 else None
