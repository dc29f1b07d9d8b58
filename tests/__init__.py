"""What the library, the examples and the benchmarks promise, by subject."""
