"""Routing by names and shapes: which leaf is a matrix, along which axes, and why.

Read downward: each module uses those above it.

    names          the table of names: what a path proposes
    stacks         names whose leaves carry a leading axis, one layer or expert after the other
    lora           the factors of low-rank adapters, their axes by the factor beside
    evidence       what lies beside a leaf; `unembedding` finds the heads of the vocabulary
    roles          the role of one leaf, decided by its names, its shape and its neighbours
    readings       all leaves of a tree; `maybe_tables` doubts, `guesses` and `remedies` advise
    route_leaves   from the parameters, and what the user declared, to a `Route` for each leaf
    report         the routes as a table

The room `use` reads the same from the program instead: the loss, and what it does to each leaf.
"""
