"""Run a script, then print the most memory that this process had, in KiB; imports the standard library alone.

    python watched.py SCRIPT [ARGUMENTS]

Asked from within: what a parent is told of a child (`ru_maxrss`) begins at the parent's own memory.
"""

import re
import runpy
import sys
from pathlib import Path

del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
print(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])
