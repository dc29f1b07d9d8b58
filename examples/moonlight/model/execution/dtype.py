"""Which dtype a device computes in where the user leaves it open."""

from typing import Any

import jax

# From here on NVIDIA's GPUs have instructions for bfloat16 (Ampere).
_FIRST_WITH_BFLOAT16 = 8.0


def compute_dtype(asked: str | None, device: Any = None) -> tuple[str, str]:
    """The dtype of activations and products, and why it is that.

    bfloat16 where the device multiplies it faster than float32: on TPUs, and on GPUs that have
    instructions for it. The others would convert every operand to float32 and back. float16, which
    a T4 is fast at, would need scaled losses, which the examples have not.

    Args:
        asked: What the user says; None leaves it open.
        device: The device; None is JAX's first.
    """
    device = device or jax.devices()[0]
    if asked is not None:
        return asked, "as asked"
    if device.platform == "cpu":
        return "float32", "most CPUs have no instructions for bfloat16"
    capability = getattr(device, "compute_capability", None)
    if capability is not None and float(capability) < _FIRST_WITH_BFLOAT16:
        why = f"compute capability {capability} has no instructions for bfloat16"
        return "float32", why
    return "bfloat16", "it multiplies bfloat16 faster; weights stay float32"
