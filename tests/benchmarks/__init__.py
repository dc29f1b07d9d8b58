"""The benchmarks, at toy size, and what reads their compiled programs."""
