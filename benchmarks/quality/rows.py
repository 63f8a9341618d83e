"""What the table of docs/quality.md holds: rows of methods on grids, and the learning rates that each may choose from."""

from dataclasses import dataclass, field, replace
from typing import Any

LR_QAT = {"name": "lr-qat", "rank": 32, "alpha": 32.0}
"""The paper's alpha of 1 divides the shift by 32, and 10,000 steps make up for it. In a cell's few steps it moved no level:
rates up to 0.03 gave PEQA's perplexity (rows w3-lr-qat-alpha-1 of quality_rates.jsonl)."""

HEADLINES = (
    *("float", "w3-rtn", "w3-peqa", "w3-lr-qat", "w3-qat", "nf4-rtn", "nf4-qlora", "nf4-q-bara"),
    *("int3-rtn", "int3-qa-lora", "int3-qa-hira", "int3-qlora"),
)
"""Rows that are also run on a supervised task, and on a second model (`--model`)."""


@dataclass(frozen=True)
class Row:
    """A line of the table: a method on a grid, run once for each seed."""

    name: str
    table: str
    method: dict[str, Any]
    grid: dict[str, Any]
    rates: tuple[float, ...] = ()
    """Learning rates to choose from; none for a row without training."""
    scales_like: str | None = None
    """The row whose rate the scales get; itself where only scales are trained."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further keys of the recipe."""
    rates_like: str | None = None
    """The row whose rates this one takes, since it differs from it in a detail only."""
    round_to: dict[str, Any] | None = None
    """Merge, then round the merged weights to this grid."""
    task: str | None = None
    """A task of lm-evaluation-harness to train for and to measure the accuracy of; None for a text and its perplexity."""

    @property
    def trained(self) -> bool:
        return bool(self.rates or self.rates_like)

    @property
    def metric(self) -> str:
        """What is measured."""
        return "accuracy" if self.task else "perplexity"

    def better(self, value: float) -> float:
        """A key to sort by: the least is the best."""
        return -value if self.task else value


def _rows() -> list[Row]:
    """Tier 1, then what goes beyond it."""
    rows = [Row("float", "", {"name": "lora"}, {})]  # untrained: nothing is added to the float model
    for bits in (3, 2):
        grid, t = {"bits": bits, "group": 64, "zero": "integer"}, f"w{bits}"
        peqa = f"{t}-peqa"
        rows += [
            Row(f"{t}-rtn", t, {"name": "rtn"}, grid),
            Row(f"{t}-gptq", t, {"name": "rtn"}, grid, more={"start": {"name": "gptq"}}),
            Row(peqa, t, {"name": "peqa"}, grid, (3e-4, 1e-3, 3e-3), peqa),
            Row(f"{t}-lr-qat", t, LR_QAT, grid, (3e-3, 1e-2, 3e-2), peqa),
            Row(f"{t}-qat", t, {"name": "qat"}, grid, (1e-4, 3e-4, 1e-3), peqa),
        ]
    nf4 = {"codebook": "nf4", "group": 64, "double_quant": True}
    low, high = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 9e-3)  # alpha as large as the rank, and 1
    rows += [Row("nf4-rtn", "nf4", {"name": "rtn"}, nf4)]
    rows += [Row(f"nf4-{name}", "nf4", {"name": name, "rank": 16}, nf4, high) for name in ("qlora", "loftq", "q-bara")]
    rows += [Row("nf4-loftq-start", "nf4", {"name": "loftq", "rank": 16}, nf4)]  # before the first step
    int3 = {"bits": 3, "group": 32, "zero": "real"}
    # Ranks that give every row of the table the trainable parameters of QA-HiRA, within 2 %.
    rows += [
        Row("int3-rtn", "int3", {"name": "rtn"}, int3),
        Row("int3-qa-lora", "int3", {"name": "qa-lora", "rank": 21, "alpha": 21.0}, int3, (1e-4, 3e-4, 1e-3)),
        Row("int3-qa-hira", "int3", {"name": "qa-hira"}, int3, (3e-5, 1e-4, 3e-4)),
        Row(
            "int3-qa-blora",
            "int3",
            {"name": "qa-blora", "rank": 76, "alpha": 76.0, "repeat": 4},
            int3,
            (1e-4, 3e-4, 1e-3),
        ),
        Row("int3-qlora", "int3", {"name": "qlora", "rank": 11, "alpha": 11.0}, int3, low, round_to=int3),
    ]
    return rows + _beyond() + [_polarity(row) for row in rows if row.name in HEADLINES]


def _polarity(row: Row) -> Row:
    """The same row, trained to tell a good review from a bad one."""
    name, scales = f"polarity-{row.name}", row.scales_like and f"polarity-{row.scales_like}"
    return replace(row, name=name, table="polarity", task="sentence_polarity", scales_like=scales)


def _beyond() -> list[Row]:
    """Tier 2: details of a method against itself, other widths, per channel, integer zeros."""
    w3, w4 = ({"bits": bits, "group": 64, "zero": "integer"} for bits in (3, 4))
    same = {"rates_like": "w3-lr-qat"}
    rows = [
        Row("detail-storage-fp32", "detail", LR_QAT | {"storage": "fp32"}, w3, **same),
        Row("detail-storage-int", "detail", LR_QAT | {"storage": "int"}, w3, **same),
        Row("detail-adapter-float32", "detail", LR_QAT | {"adapter_dtype": "float32"}, w3, **same),
        Row("detail-adam-8bit", "detail", LR_QAT, w3, more={"train": {"optimizer": "adamw-8bit"}}, **same),
        Row("detail-balanced", "detail", LR_QAT | {"k": 2}, w3, (3e-3, 1e-2, 3e-2), "w3-peqa"),
    ]
    for name, grid in (("w4", w4), ("w4-channel", w4 | {"group": None}), ("w3-channel", w3 | {"group": None})):
        peqa = f"{name}-peqa"
        rows += [
            Row(f"{name}-rtn", name, {"name": "rtn"}, grid),
            Row(peqa, name, {"name": "peqa"}, grid, (3e-4, 1e-3, 3e-3), peqa),
            Row(f"{name}-lr-qat", name, LR_QAT, grid, (3e-3, 1e-2, 3e-2), peqa),
            Row(f"{name}-qat", name, {"name": "qat"}, grid, (1e-4, 3e-4, 1e-3), peqa),
        ]
    for name, activations, kv in (("w4a8kv8", 8, 8), ("w4a4kv4", 4, 4)):
        more = {"activations": {"bits": activations}, "kv": {"bits": kv}}
        rows.append(Row(f"{name}-rtn", "activations", {"name": "rtn"}, w4, more=more))
        rows.append(Row(f"{name}-lr-qat", "activations", LR_QAT, w4, more=more, rates_like="w4-lr-qat"))
    zeros = {"bits": 3, "group": 32, "zero": "integer"}
    rows += [
        Row(
            "int3-mean-qa-hira", "int3", {"name": "qa-hira", "mean": True}, zeros | {"zero": "real"}, (1e-3, 3e-3, 1e-2)
        ),
        Row("int3-integer-qa-hira", "int3", {"name": "qa-hira"}, zeros, (1e-4, 3e-4, 1e-3)),
    ]
    # At 4 bits and group 32 SmolLM2's own weights lie on the grid: a row there would be a fake result.
    int2 = zeros | {"bits": 2, "zero": "real"}
    return [
        *rows,
        Row("int2-rtn", "int2", {"name": "rtn"}, int2),
        Row("int2-qa-lora", "int2", {"name": "qa-lora", "rank": 21, "alpha": 21.0}, int2, (1e-4, 3e-4, 1e-3)),
        Row("int2-qa-hira", "int2", {"name": "qa-hira"}, int2, (3e-5, 1e-4, 3e-4)),
        Row(
            "int2-qlora", "int2", {"name": "qlora", "rank": 11, "alpha": 11.0}, int2, (3e-4, 1e-3, 3e-3), round_to=int2
        ),
    ]


ROWS = {row.name: row for row in _rows()}
