"""One self-contained page: sections of text, tables and Vega-Lite charts, light or dark as the reader's system is.

The page asks for nothing: its policy (the Content-Security-Policy element) forbids every request, to wherever, so that a
chart or a text in it cannot make one either. All that is put in is escaped here.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --card: #fff; --ink: #1c2024; --soft: #60646c; --line: #e3e4e8;
  --mark: #fff1c2; --accent: #2f6fb3; }
@media (prefers-color-scheme: dark) { :root { --ground: #121416; --card: #1b1e21; --ink: #e8eaed; --soft: #9ba1a9;
  --line: #33373c; --mark: #57480f; --accent: #7fb4ea; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 34px 0 10px; }
p { margin: 6px 0 10px; } .soft, figcaption { color: var(--soft); font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 10px; margin: 18px 0 4px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 9px 12px; }
.card b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(390px, 1fr)); gap: 12px; }
figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; margin: 0 0 12px;
  min-width: 0; }
figcaption { margin-top: 6px; } .chart { width: 100%; min-height: 40px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 500; } th, td { padding: 3px 18px 3px 0; vertical-align: top; }
tr { border-bottom: 1px solid var(--line); } td.number, th.number { text-align: right; }
pre, .text { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px;
  margin: 0 0 10px; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px; }
mark { background: var(--mark); color: inherit; } details > summary { cursor: pointer; color: var(--soft); }
"""
_CREDIT = (
    "<!-- Made by trimtab. Charts by Vega, Vega-Lite and Vega-Embed, carried below: copyright University of Washington "
    "Interactive Data Lab and contributors, BSD-3-Clause, https://vega.github.io -->"
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data:"
_DRAW = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const theme = dark.matches ? "dark" : "light";
  const ink = dark.matches ? "#c9cdd2" : "#3b4046", line = dark.matches ? "#33373c" : "#e3e4e8";
  const config = { background: "transparent", font: "system-ui, sans-serif", view: { stroke: "transparent" },
    axis: { labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: 500 },
    legend: { labelColor: ink, titleColor: ink, titleFontWeight: 500 }, title: { color: ink }, text: { color: ink },
    range: { category: dark.matches
      ? ["#7fb4ea", "#f0a35e", "#7cc59a", "#d5a0dd", "#9ba1a9", "#e5c85b", "#7fd3d8", "#ee8a8a", "#b9a58e", "#c3cf74"]
      : ["#2f6fb3", "#d9731a", "#2e8b57", "#9048a0", "#868c94", "#b8960c", "#1b8f96", "#c23b3b", "#846a4c", "#7a8b12"] } };
  config.mark = { color: config.range.category[0] };
  for (const [id, spec] of Object.entries(charts))
    vegaEmbed("#" + id, spec, { actions: false, renderer: "svg", config, tooltip: { theme } })
      .catch(error => console.error(id + ": " + error));
}
dark.addEventListener("change", draw);
draw();
"""


class Page:
    """A page as it grows, from the top.

    Args:
        title: of the page.
        about: a line under it.
    """

    def __init__(self, title: str, about: str) -> None:
        self.title, self.charts = title, dict[str, Mapping[str, Any]]()
        self._parts = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(about)}</p>']

    def section(self, title: str, note: str = "") -> None:
        """A heading, and a line under it."""
        self._parts.append(f"<h2>{escape(title)}</h2>")
        if note:
            self.text(note)

    def text(self, text: str) -> None:
        """A paragraph in a soft colour."""
        self._parts.append(f'<p class="soft">{escape(text)}</p>')

    def cards(self, cards: Sequence[tuple[str, str]]) -> None:
        """The few numbers to be seen first: (what, value)."""
        each = "".join(
            f'<div class="card"><span class="soft">{escape(what)}</span><b>{escape(value)}</b></div>'
            for what, value in cards
        )
        self._parts.append(f'<div class="cards">{each}</div>')

    def figures(self, *charts: tuple[Mapping[str, Any], str]) -> None:
        """Charts beside one another where there is room: (a Vega-Lite chart, what it shows in words)."""
        each = ""
        for chart, caption in charts:
            name = f"chart{len(self.charts)}"
            self.charts[name] = chart
            each += f'<figure><div class="chart" id="{name}"></div><figcaption>{escape(caption)}</figcaption></figure>'
        self._parts.append(f'<div class="{"charts" if len(charts) > 1 else "one"}">{each}</div>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> None:
        """A table of text; `numbers` are columns to be aligned on the right."""

        def cells(tag: str, row: Sequence[str]) -> str:
            kinds = (' class="number"' if i in numbers else "" for i in range(len(row)))
            return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
        head = f"<tr>{cells('th', header)}</tr>" if any(header) else ""
        self._parts.append(f'<div class="wide"><table>{head}{body}</table></div>')

    def code(self, text: str, summary: str = "") -> None:
        """Text as it is written; behind a summary that opens it, where one is given."""
        block = f"<pre>{escape(text)}</pre>"
        self._parts.append(f"<details><summary>{escape(summary)}</summary>{block}</details>" if summary else block)

    def pair(self, *texts: tuple[str, str]) -> None:
        """Texts beside one another: (heading, text)."""
        each = "".join(
            f'<div><p class="soft">{escape(name)}</p><div class="text">{escape(text)}</div></div>'
            for name, text in texts
        )
        self._parts.append(f'<div class="pair">{each}</div>')

    def marked(self, pieces: Sequence[tuple[str, bool]]) -> None:
        """A text of which some pieces are marked."""
        each = "".join(f"<mark>{escape(text)}</mark>" if on else escape(text) for text, on in pieces)
        self._parts.append(f'<div class="text">{each}</div>')

    def html(self, script: str) -> str:
        """The whole page.

        Args:
            script: JavaScript that defines `vegaEmbed` (`vega.script`).
        """
        data = json.dumps(self.charts, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
        return (
            f'<!doctype html>\n{_CREDIT}\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
            + "\n".join(self._parts)
            + f'\n</main>\n<script type="application/json" id="charts">{data}</script>\n'
            f"<script>{script}</script>\n<script>{_DRAW}</script>\n</body>\n</html>\n"
        )
