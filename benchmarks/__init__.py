"""What is measured: `python -m` runs each file or folder, `python -m benchmarks.wire` for one.

- One device: `step`, `orthogonalize`, `train`, `compile_time`; a GPU or TPU: `accelerator`.
- A mesh, read from compiled programs: `wire`, `scale`, `rounding`, `plan_search`.
- The example's runs: `checkpoint`, `endurance`.
- Where parameters go: `roles`, `routing_figures`.
- The tests: `mutants`.

`report` makes the docs' tables and pictures. `model_shapes` knows the matrices of real models,
`peaks` what a device can do at most, `device_clock` what it took. `hlo` reads compiled programs,
`targets` names machines to compile for, `harness` times and records.
"""
