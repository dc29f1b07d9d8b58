"""Models of the zoo as programs: what `by_use` reads, and may not read wrongly.

Most are written in a few lines of JAX on the zoo's own leaves, from their published descriptions;
those of Flax's, Haiku's and Equinox's layers are built of them.
"""
