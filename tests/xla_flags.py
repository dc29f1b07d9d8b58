"""The flags that tests run with: `python -m tests.xla_flags` prints them.

`python -m tests.xla_flags bits` prints those of tests that promise bits: programs are compiled to
the same code with them, sooner.

Tests compile much and compute little. Without XLA's optimizer, and with the older and quicker
way of emitting code where jaxlib still has it (0.10 does, 0.12 does not), they take half the time.
Code in one part instead of 32 that are compiled side by side saves a sixth of what is left: the
other core has a worker of pytest of its own.
"""

import sys

from examples.xla_flags import known_flags

BITS = ("--xla_cpu_parallel_codegen_split_count=1",)
WANTED = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false", *BITS)

if __name__ == "__main__":
    print(*known_flags(BITS if sys.argv[1:] == ["bits"] else WANTED))
