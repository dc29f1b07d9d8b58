"""``python -m muon_jax``: see `muon_jax._planning.command`."""

import sys

from muon_jax._planning.command import main

if __name__ == "__main__":
    sys.exit(main())
