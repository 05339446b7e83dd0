"""Prints the first ```sh block below a heading of README.md: `python3 .ci/readme_commands.py "## Test"`."""

import re
import sys
from pathlib import Path

heading = sys.argv[1]
_, _, below = Path("README.md").read_text(encoding="utf-8").partition(f"\n{heading}\n")
section = below.partition("\n## ")[0]
block = re.search(r"^```sh\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
if block is None:
    sys.exit(f"README.md has no ```sh block below {heading!r}")
print(block[1], end="")
