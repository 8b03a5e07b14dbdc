"""What pyvlm says beside its results."""

import sys


def tell(line: str) -> None:
    """One line on stderr, with who says it: stdout is for results."""
    print(f"pyvlm: {line}", file=sys.stderr)
