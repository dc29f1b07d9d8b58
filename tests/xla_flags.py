"""The flags that tests run with unless they promise bits: `python -m tests.xla_flags` prints them.

Such tests compile much and compute little. Without XLA's optimizer, and with the older and quicker
way of emitting code where jaxlib still has it (0.10 does, 0.12 does not), they take half the time.
Code in one part instead of 32 that are compiled side by side saves a sixth of what is left: the
other core has a worker of pytest of its own.
"""

from examples.xla_flags import known_flags

WANTED = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)

if __name__ == "__main__":
    print(*known_flags(WANTED))
