"""python -m seqlib.bench [op ...] [--dtype D] [--threads N] [--repeats N] [--budget S] [--isa I] [--json FILE]

`--isa avx2` times what a machine without AVX-512 would run.
`python -m seqlib.bench gpu` times the GPU instead, see seqlib/bench/gpu.py.
"""

from __future__ import annotations

import sys

from seqlib.bench import gpu, report

if __name__ == "__main__":
    sys.exit(gpu.main(sys.argv[2:]) if sys.argv[1:2] == ["gpu"] else report.main())
