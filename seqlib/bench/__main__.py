"""python -m seqlib.bench [op ...] [--dtype D] [--threads N] [--repeats N] [--budget S] [--json FILE]"""

from __future__ import annotations

import sys

from seqlib.bench.report import main

if __name__ == "__main__":
    sys.exit(main())
