"""mkdocs's hook: the source of the site is put together again before every build (`docs_site`), by trimtab's own Python.

TRIMTAB_PYTHON names that Python: mkdocs runs in an environment of its own, without torch.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_pre_build(config: Any) -> None:
    """Called by mkdocs."""
    python = os.environ.get("TRIMTAB_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
    subprocess.run([python, str(ROOT / "tools" / "docs_site.py")], check=True)
