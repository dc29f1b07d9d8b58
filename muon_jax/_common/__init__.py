"""What every part of the library uses, and what knows none of them.

paths, prefix, trees  the name of a leaf in any container; a tree of settings beside it
checks, parameters    wrong numbers, wrong trees: refused by argument and leaf
dtypes                dtypes without implicit promotion
bits                  bfloat16 that is moved, as integers
loops, pieces         a batch in chunks, one after the other; an array cut in pieces
injectable            arguments that `optax.inject_hyperparams` shall not take for schedules
tables, alike         text for reports; names that differ in numbers only, as one
"""
