"""The flags that tests run with unless they promise bits: `python -m tests.xla_flags` prints them.

Such tests compile much and compute little. Without XLA's optimizer, and with the older and quicker
way of emitting code where jaxlib still has it (0.10 does, 0.12 does not), they take half the time.
"""

from examples.xla_flags import known_flags

WANTED = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")

if __name__ == "__main__":
    print(*known_flags(WANTED))
