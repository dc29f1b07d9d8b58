"""Programs built on muon_jax."""

import importlib.util
import sys

# `python -m examples.minimal` where the library alone is installed; others see Python's own words.
if sys.argv[0] == "-m" and importlib.util.find_spec("tyro") is None:
    sys.exit('the examples need more than the library: python -m pip install -e ".[examples]"')
