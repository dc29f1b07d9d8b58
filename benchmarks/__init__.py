"""What is measured: `python -m benchmarks.NAME` runs the file or the folder of that name.

- One device: `step`, `train`, `compile_time`.
- A mesh, read from compiled programs: `wire`, `scale`, `rounding`, `plan_search`.
- The example's runs: `checkpoint`, `endurance`.
- Where parameters go: `roles`, `routing_figures`.
- The tests: `mutants`.

`hlo` reads compiled programs, `targets` names machines to compile for, `harness` times and records.
"""
