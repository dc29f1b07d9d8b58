"""The mesh: where state and parameters lie, who orthogonalizes what, and how it is run.

Where things lie:

    specs, layout, split_layout   the specs of the parameters; how those and ZeRO-1 cut a leaf
    tiles                         which cuts suit a TPU, and its layouts
    zero1                         the mesh as `muon` was given it
    placed, state_shardings       the state's shardings, for `jax.jit` and for Orbax

Who does what, a pure function of shapes, decided while the step is traced:

    plan                          its words, and an example in numbers: begin here
    grouping, choices             the groups; the routes open to each
    cost, pricing                 what sending costs on this mesh; what a part costs
    planner                       the plan

How it is run, inside one `shard_map`:

    shards                        the border: what goes in, and how it lies there
    distributed                   the six phases of a step, as in the paper's Algorithm 1
    run_group, part_runner        phases 3 to 6 of a group, and of one part of it
    owner_runners                 the routes on which matrices travel to owners
    collectives, gather           all_to_all and all_gather in bfloat16; AdamW's gather

The mathematics of a matrix is outside: a runner calls it, and it knows of no mesh.
"""
