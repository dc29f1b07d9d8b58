"""Whether results are right on this device, before anything is timed on it."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.harness import attempt_each
from benchmarks.orthogonalize.accuracy import Spectrum
from benchmarks.orthogonalize.sides import Peer, build
from muon_jax import orthogonalize

# Measured on CPU: 0.012 to 0.016 from 48 rows up and 0.029 at most below, and 3e-7 to 1.2e-6.
# Rounding the sums as well, and not only the products, is 0.04 to 0.07.
LARGEST = {"bfloat16": 0.035, "float32": 1e-4}

# Sides that are no whole number of tiles, beside the models' own.
AWKWARD = ((1, 7), (3, 3), (100, 130), (257, 1031))


def check(rows: int, cols: int, peers: tuple[Peer, ...]) -> dict[str, Any]:
    """Two wide matrices and their transposes, in both dtypes, against float64 and the peers.

    Returns:
      For each dtype the largest distance from the same steps in exact arithmetic, relative to them,
      and the polar error; the same of the peers; and "right", whether ours are within `LARGEST`.
    """
    x = np.random.default_rng(rows * 10_007 + cols).standard_normal((2, rows, cols), np.float32)
    spectra = [Spectrum(matrix) for matrix in x]
    found: dict[str, Any] = {"rows": rows, "cols": cols, "distance": {}, "polar_error": {}}

    def hold(name: str, wide: np.ndarray) -> None:
        pairs = list(zip(spectra, wide, strict=True))
        found["distance"][name] = max(s.rounding_error(out) for s, out in pairs)
        found["polar_error"][name] = max(s.polar_error(out) for s, out in pairs)

    for dtype in LARGEST:
        wide = np.asarray(orthogonalize(jnp.asarray(x), ns_dtype=dtype))
        tall = np.asarray(orthogonalize(jnp.asarray(x.mT), ns_dtype=dtype)).mT
        hold(f"muon_jax {dtype}", wide)
        hold(f"muon_jax {dtype}, transposed", tall)

    def first(peer: Peer) -> np.ndarray:
        return build(peer, x, passes=1).first()

    builders = {peer: functools.partial(first, peer) for peer in peers if peer != "muon_jax"}
    others, failed = attempt_each(builders, np.shape)
    for peer, out in others.items():
        found["distance"][peer] = spectra[0].rounding_error(out)
        found["polar_error"][peer] = spectra[0].polar_error(out)
    found["exact_polar_error"] = max(s.exact_polar_error for s in spectra)
    found["failed"] = failed
    found["right"] = all(
        found["distance"][f"muon_jax {dtype}{which}"] <= limit
        for dtype, limit in LARGEST.items()
        for which in ("", ", transposed")
    )
    return found
