"""A page in headless Chromium: what it becomes, what it says on its console, and what it asks the network for.

    python tests/browser.py PAGE.html OUT.png [dark] [WIDTHxHEIGHT]     a picture of it

Chromium alone, by its own options, and no library: `chromium` or `google-chrome` on the PATH, or TRIMTAB_CHROMIUM.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# No sandbox: containers forbid it, and the page is our own. No requests of the browser itself.
_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-sync",
    "--disable-features=OptimizationHints,MediaRouter,Translate", "--enable-logging=stderr", "--log-level=0",
    "--virtual-time-budget=8000", "--timeout=60000",
)  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """What a page did."""

    dom: str
    """The document after its scripts have run."""
    console: list[str]
    """Lines of its console."""
    requests: list[str]
    """What was asked for beside files and data."""


def chromium() -> str | None:
    """The browser, or None."""
    return os.environ.get("TRIMTAB_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


def open_page(page: Path, *, dark: bool = False, picture: Path | None = None, window: str = "1060x900") -> Opened:
    """Open a page, for a reader who likes it light or dark."""
    browser = chromium()
    assert browser is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "net.json"
        command = [browser, *_OPTIONS, f"--user-data-dir={folder}/profile", f"--log-net-log={log}"]
        command += [
            f"--window-size={window.replace('x', ',')}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        ]
        command += ["--dump-dom"] if picture is None else [f"--screenshot={picture}"]
        done = subprocess.run(
            [*command, page.resolve().as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        text = log.read_text()
    try:
        events = json.loads(text)["events"]
    except ValueError:  # it was not ended properly
        events = json.loads(text.rstrip().rstrip(",") + "]}")["events"]
    # What the browser asks for itself (its updates, the time) is of no page: it has no origin.
    told = [event.get("params", {}) for event in events]
    asked = {t["url"] for t in told if "url" in t and t.get("initiator", "not an origin") != "not an origin"}
    console = re.findall(r":CONSOLE.*?\] (.*)", done.stderr)
    return Opened(done.stdout, console, sorted(url for url in asked if not url.startswith(("file://", "data:"))))


if __name__ == "__main__":
    size = sys.argv[-1] if re.fullmatch(r"\d+x\d+", sys.argv[-1]) else "1060x900"
    found = open_page(Path(sys.argv[1]), dark="dark" in sys.argv, picture=Path(sys.argv[2]), window=size)
    print("\n".join([*found.console, *found.requests]) or "nothing on the console, no request")
