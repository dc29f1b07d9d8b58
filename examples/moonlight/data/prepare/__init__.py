"""Makes tokens of texts that no memory holds: `python -m examples.moonlight.data.prepare`.

`pieces` cuts the files into pieces of some megabytes, `encoding` makes tokens of a piece, in as
many processes as there are cores, and `output` writes them down in order, so that the program goes
on where it was ended. `examples/moonlight/data/prepared.py` reads what was written.
"""
