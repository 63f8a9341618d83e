"""Pictures of six pages of the built site, at the width of a desktop and of a phone, and of the first hour: docs/pictures.

    make docs && .venv/bin/python tools/docs_pictures.py
    python benchmarks/first_hour.py ... && .venv/bin/python tools/docs_pictures.py hour

Chromium takes them (tests/browser.py says how it is found); a phone's width is that of a frame, as no window is so narrow.
"""

import io
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).parents[1]
SITE, OUT = ROOT / "build" / "site", ROOT / "docs" / "pictures"
PAGES = ("index", "tutorials/own-data", "methods/lr-qat", "choosing", "recipe", "troubleshooting")
DESKTOP, PHONE = (1280, 900), (390, 844)
COLOURS, COLUMNS = 48, 110
HOUR = ROOT / "build" / "hour"
TERMINAL = """<body style="margin:0;background:{background}"><pre style="margin:16px;color:{foreground};
font:15px/1.35 'DejaVu Sans Mono',monospace">{code}</pre></body>"""


def picture(page: Path, out: Path, size: tuple[int, int]) -> None:
    """One page in Chromium, cut to a size and to a few colours."""
    width, height = size
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(
            f'<body style="margin:0"><iframe src="{page.as_uri()}" width="{width}" height="{height}" '
            'style="border:0"></iframe></body>',
            encoding="utf-8",
        )
        taken = Path(folder) / "taken.png"
        window = f"{max(width, 600)}x{height + 100}"
        command = [sys.executable, str(ROOT / "tests" / "browser.py"), str(frame), str(taken), window]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with Image.open(taken) as image:
            image.convert("RGB").crop((0, 0, width, height)).quantize(COLOURS).save(out, optimize=True)


def terminal(shown: str) -> str:
    """A page that looks as a terminal does on which this was printed, escape sequences included."""
    console = Console(file=io.StringIO(), record=True, width=COLUMNS)
    console.print(Text.from_ansi(shown), soft_wrap=True)
    return console.export_html(theme=MONOKAI, code_format=TERMINAL, inline_styles=True)


def hour() -> None:
    """What benchmarks/first_hour.py left: the terminal after `trimtab run`, and the report of that run."""
    shown = (HOUR / "terminal.ansi").read_text(encoding="utf-8")
    (HOUR / "terminal.html").write_text(terminal(shown), encoding="utf-8")
    picture(HOUR / "terminal.html", OUT / "hour-terminal.png", (1060, 36 + 20 * len(shown.splitlines())))
    picture(HOUR / "report.html", OUT / "hour-report.png", (1060, 1500))


def main() -> None:
    """All of them."""
    OUT.mkdir(exist_ok=True)
    if sys.argv[1:] == ["hour"]:
        hour()
        return
    for name in PAGES:
        for kind, size in (("desktop", DESKTOP), ("phone", PHONE)):
            picture(SITE / f"{name}.html", OUT / f"{Path(name).name}-{kind}.png", size)


if __name__ == "__main__":
    main()
