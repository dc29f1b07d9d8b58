"""Count what an optimizer's step reads and writes: `python -m benchmarks.traffic`."""
