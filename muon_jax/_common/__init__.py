"""What every part of the library uses, and what knows none of them.

paths, prefix, trees  the name of a leaf in any container; a tree of settings beside it
checks, parameters    wrong numbers, wrong trees: refused by argument and leaf
dtypes, loops         dtypes without implicit promotion; a batch in chunks
injectable            arguments that `optax.inject_hyperparams` shall not take for schedules
tables, alike         text for reports; names that differ in numbers only, as one
"""
