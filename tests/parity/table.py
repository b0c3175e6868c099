"""Prints the parity table of BUILD.md as markdown: every family and case, measured now.

    python -m tests.parity.table [REGEX]        (torch and transformers needed)
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.parity.cases import CASES
from tests.parity.measure import MAX_BFLOAT16_RATIO, MAX_FLOAT32, Measured, measure

HEAD = "| family | case | logits | loss | gradients | decoded | tokens | experts | bfloat16 |"
RULE = "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"


def row(name: str, found: Measured) -> str:
    """One line of the table."""
    family, case = name.split("-")
    decoded = "-" if found.decoded is None else f"{found.decoded:.1e}"
    tokens = "-" if found.decoded is None else f"{found.tokens_equal}/{found.tokens_compared}"
    numbers = f"{found.logits:.1e} | {found.loss:.1e} | {found.gradient:.1e} | {decoded}"
    experts = f"{found.routed_equal}/{found.routed_compared}" if found.routed_compared else "-"
    return f"| {family} | {case} | {numbers} | {tokens} | {experts} | {found.bfloat16:.2f} |"


def rows(pattern: str) -> Iterator[str]:
    """Every case whose name the pattern finds."""
    for name in CASES:
        if re.search(pattern, name):
            with tempfile.TemporaryDirectory() as folder:
                yield row(name, measure(name, Path(folder)))


def main() -> None:
    """Prints the table, a line as soon as it is measured."""
    import transformers

    print(f"Against transformers {transformers.__version__}, allowed: {MAX_FLOAT32:.0e} (float32),")
    print(f"{MAX_BFLOAT16_RATIO} (bfloat16).\n\n{HEAD}\n{RULE}")
    for line in rows(sys.argv[1] if len(sys.argv) > 1 else ""):
        print(line, flush=True)


if __name__ == "__main__":
    main()
