"""Vega-Lite, the plotting library of every page, as one script: the only file that imports vl_convert.

A page carries it (0.9 MB), so that it can be opened anywhere, at any time, without a network. Vega-Lite was taken before
plotly, which is 4.7 MB a page, and bokeh, whose colours Python decides: a page could not follow its reader's dark mode.
And a chart of it is a mapping of plain values, which a test can read.
"""

import tempfile
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trimtab.extras import missing, require
from trimtab.kernels.cache import own_folder, trusted


def lacking() -> bool:
    """Whether the library is not installed."""
    return bool(missing("report"))


@cache
def script() -> str:
    """JavaScript that defines `vegaEmbed`, fit for a `<script>` element.

    The library takes seconds to put it together, so it is kept beside the compiled kernels (`TRIMTAB_CACHE`).

    Raises:
        UserError: where the extra is not installed.
    """
    require("report.html", "report")
    name = f"vega-{version('vl-convert-python')}.js"
    with suppress(OSError):  # a page runs it, so it has to be our own
        return trusted(own_folder() / name).read_text(encoding="utf-8")
    import vl_convert

    bundle: Any = vl_convert.javascript_bundle  # its types ask for a snippet, which it does not
    made = str(bundle()).replace("</script", "<\\/script")
    try:
        folder = own_folder()
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            (Path(staging) / name).write_text(made, encoding="utf-8")
            (Path(staging) / name).chmod(0o600)
            (Path(staging) / name).replace(folder / name)
    except OSError:
        return made  # a folder that cannot be written costs a few seconds each time, and nothing else
    return made
