"""Pictures of six pages of the built site, at the width of a desktop and of a phone: docs/pictures.

    make docs && .venv/bin/python tools/docs_pictures.py

Chromium takes them (tests/browser.py says how it is found); a phone's width is that of a frame, as no window is so narrow.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
SITE, OUT = ROOT / "build" / "site", ROOT / "docs" / "pictures"
PAGES = ("index", "tutorials/own-data", "methods/lr-qat", "choosing", "recipe", "troubleshooting")
DESKTOP, PHONE = (1280, 900), (390, 844)
COLOURS = 48


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


def main() -> None:
    """All of them."""
    OUT.mkdir(exist_ok=True)
    for name in PAGES:
        for kind, size in (("desktop", DESKTOP), ("phone", PHONE)):
            picture(SITE / f"{name}.html", OUT / f"{Path(name).name}-{kind}.png", size)


if __name__ == "__main__":
    main()
