"""Benchmarks: `python -m benchmarks` measures every op beside its peers and beside the machine's limits.

`harness/` knows no op. Each other module here is one op family: its `OPERATION` names its workloads (made
from the cases of the tests), its providers and its reference. A new module needs no entry anywhere.
"""

import sys
from pathlib import Path

# The cases and the tolerance policy live with the tests and are imported from there as the tests do.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
