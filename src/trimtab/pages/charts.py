"""The charts of our pages as Vega-Lite mappings (https://vega.github.io/vega-lite): plain values in, plain values out.

Colours of text, grids and categories are the page's (`html`): they follow the reader's light or dark mode.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
Chart = dict[str, Any]

_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
"""Says which grammar this is; nobody fetches it."""
_FIT = {"type": "fit-x", "contains": "padding"}


def _chart(rows: Rows, **parts: Any) -> Chart:
    return {"$schema": _SCHEMA, "width": "container", "autosize": _FIT, "data": {"values": list(rows)}, **parts}


def _axis(field: str, title: str, kind: str = "quantitative", **more: Any) -> dict[str, Any]:
    return {"field": field, "type": kind, "title": title, **more}


def _scale(log: bool) -> dict[str, Any]:
    return {"type": "log"} if log else {"zero": False}


def line(rows: Rows, x: str, y: str, *, titles: tuple[str, str], by: str | None = None, log: bool = False) -> Chart:
    """Lines over a number (whole ones, where they go beyond 1), with every value under the pointer.

    Args:
        rows: each with `x`, `y`, and `by` where given.
        x: name of the number along.
        y: name of the value.
        titles: of the two axes.
        by: name of what tells lines apart.
        log: whether the value's axis is logarithmic.
    """
    encoding: dict[str, Any] = {
        "x": _axis(x, titles[0], axis={"grid": False, **({"tickMinStep": 1} if _beyond(rows, x) else {})}),
        "y": _axis(y, titles[1], scale=_scale(log)),
        "tooltip": [_axis(x, titles[0]), _axis(y, titles[1], format=".4g")],
    }
    if by is not None:
        encoding["color"] = _axis(by, "", "nominal", legend={"orient": "top"})
        encoding["tooltip"].append(_axis(by, "of", "nominal"))
    return _chart(rows, height=210, mark={"type": "line", "point": len(rows) < 60}, encoding=encoding)


def _beyond(rows: Rows, x: str) -> bool:
    return any(row[x] > 1 for row in rows)


def bars(rows: Rows, *, title: str, format_: str = "~s", by: bool = False, log: bool = False) -> Chart:
    """Bars beside their names, in the order given, each with its value.

    Args:
        rows: `name`, `value`, `shown` (the value in words), and `part` where bars are made of parts.
        title: of the axis.
        format_: of the axis' numbers.
        by: whether bars have parts.
        log: whether the axis is logarithmic.
    """
    names = list(dict.fromkeys(row["name"] for row in rows))
    across = _axis(
        "value", title, axis={"format": format_, "grid": True}, scale={"type": "log"} if log else {"zero": True}
    )
    down = _axis("name", "", "nominal", sort=names, axis={"labelLimit": 190})
    tooltip = [_axis("name", " ", "nominal"), _axis("shown", title, "nominal")]
    if by:
        parts = list(dict.fromkeys(row["part"] for row in rows))
        color = _axis("part", "", "nominal", sort=parts, legend={"orient": "bottom", "columns": 2})
        encoding = {"x": across, "y": down, "color": color, "tooltip": [*tooltip, _axis("part", "for", "nominal")]}
        order = [{**row, "order": parts.index(row["part"])} for row in rows]
        return _chart(order, height=30 * len(names), mark="bar", encoding={**encoding, "order": {"field": "order"}})
    # On a logarithmic axis a bar has no honest length: a point has a place.
    mark: Any = {"type": "point", "filled": True, "size": 90} if log else {"type": "bar", "height": {"band": 0.62}}
    text = {"type": "text", "align": "left", "dx": 8 if log else 4}
    layers = [
        {"mark": mark, "encoding": {"tooltip": tooltip}},
        {"mark": text, "encoding": {"text": {"field": "shown"}}},
    ]
    return _chart(
        rows,
        height=30 * len(names),
        layer=layers,
        encoding={"x": across, "y": down},
        padding={"left": 2, "top": 4, "right": 46, "bottom": 5},
    )


def heat(
    rows: Rows, *, value: str, title: str, tooltip: Sequence[tuple[str, str, str]], format_: str = ".2%",
    across: str = "block",
) -> Chart:  # fmt: skip
    """A heat map of layers: blocks along, the parts of a block down.

    Args:
        rows: `block`, `part` and `value`.
        value: name of what colours a cell.
        title: of the colours.
        tooltip: (name, title, format; "" for text) of what is said under the pointer.
        format_: of the colours' numbers.
        across: what is along.
    """
    blocks, parts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("block", "part"))
    said = [_axis(n, t, "quantitative", format=f) if f else _axis(n, t, "nominal") for n, t, f in tooltip]
    legend = {"orient": "bottom", "gradientLength": 240, "format": format_, "titleOrient": "left"}
    encoding = {
        "x": _axis(
            "block",
            across,
            "ordinal",
            sort=blocks,
            axis={"labelOverlap": True, **({} if across != "block" else {"labelAngle": 0})},
        ),
        "y": _axis("part", "", "ordinal", sort=parts, axis={"labelLimit": 190}),
        "color": _axis(value, title, scale={"scheme": "viridis", "zero": True}, legend=legend),
        "tooltip": said,
    }
    return _chart(rows, height=24 * len(parts), mark={"type": "rect", "cornerRadius": 1}, encoding=encoding)


def front(trials: Rows, points: Rows, *, quality: str, log: bool, lines: Rows = ()) -> Chart:
    """All trials of a search and their Pareto front: what a point is, under the pointer.

    Args:
        trials: `megabytes`, `quality`, `kind`, `bits` and `number` of each finished one.
        points: the same of the front, by ascending bytes, with `recipe`.
        quality: title of the value.
        log: whether its axis is logarithmic.
        lines: `megabytes` or `quality` and `name` of what is drawn across: a budget, the float model.
    """
    x = _axis("megabytes", "stored weights, MB", scale={"zero": False, "nice": True, "padding": 12})
    y = _axis("quality", quality, scale={**_scale(log), "padding": 12})
    said = [
        _axis("number", "trial", "nominal"), _axis("kind", "made by", "nominal"), _axis("megabytes", "MB", format=".4~g"),
        _axis("quality", quality, format=".4g"), _axis("bits", "mean bits", format=".2f"),
    ]  # fmt: skip
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "point", "filled": True, "size": 45, "opacity": 0.55},
            "encoding": {
                "x": x,
                "y": y,
                "color": _axis("kind", "", "nominal", legend={"orient": "top"}),
                "tooltip": said,
            },
        },
        {
            "data": {"values": list(points)},
            "mark": {"type": "line", "strokeWidth": 1.5, "point": {"size": 90, "filled": False, "strokeWidth": 2}},
            "encoding": {"x": x, "y": y, "tooltip": [*said, _axis("recipe", "recipe", "nominal")]},
        },
    ]
    for row in lines:
        place = {"x": _axis("megabytes", "")} if "megabytes" in row else {"y": _axis("quality", "")}
        rule = {
            "mark": {"type": "rule", "strokeDash": [5, 4]},
            "encoding": {**place, "tooltip": _axis("name", " ", "nominal")},
        }
        layers.append({"data": {"values": [row]}, **rule})
    return _chart(trials, height=360, layer=layers)
