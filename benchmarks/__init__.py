"""What is measured: `python -m` runs each file or folder, `python -m benchmarks.wire` for one.

- One device: `step`, `train`, `compile_time`.
- A mesh, read from compiled programs: `wire`, `scale`, `rounding`, `plan_search`.
- The example's runs: `checkpoint`, `endurance`.
- Where parameters go: `roles`, `routing_figures`.
- The tests: `mutants`.

`hlo` reads compiled programs, `targets` names machines to compile for, `harness` times and records.
"""
