"""The FLOPs of one product: a dot, a convolution, a call of cuBLAS or of a TPU kernel."""

import base64
import json
import math
import re
from collections.abc import Callable, Mapping

from benchmarks.hlo.module import Computation, Instruction
from benchmarks.hlo.shapes import Array, arrays_of


def product_flops(
    instruction: Instruction, computation: Computation, kernels: Mapping[str, float] | None = None
) -> float:
    """2 FLOPs for each multiplication of a product; 0 for any other instruction.

    Args:
      instruction: the instruction.
      computation: where it stands.
      kernels: the FLOPs of TPU kernels whose names begin so, instead of what they say.
    """
    if instruction.opcode == "custom-call":
        for name, known in (kernels or {}).items():
            if instruction.name.startswith(name):
                return known
    counters: dict[str, Callable[[Instruction, Computation], float]] = {
        "dot": _dot_flops,
        "convolution": _convolution_flops,
        "custom-call": _library_flops,
    }
    counter = counters.get(instruction.opcode)
    return counter(instruction, computation) if counter else 0.0


def _operand(instruction: Instruction, index: int, computation: Computation) -> Array:
    shape = computation.instructions[instruction.operand_names[index]].shape
    if not isinstance(shape, Array):
        raise ValueError(f"operand {index} of {instruction.name} is a tuple, expected an array")
    return shape


def _dot_flops(dot: Instruction, computation: Computation) -> float:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    contracted = [int(dim) for dim in found[1].split(",") if dim] if found else []
    return _contraction_flops(dot, computation, contracted)


def _contraction_flops(
    product: Instruction, computation: Computation, contracted: list[int]
) -> float:
    lhs = _operand(product, 0, computation)
    result = next(arrays_of(product.shape))
    return 2.0 * result.elements * math.prod(lhs.dims[dim] for dim in contracted)


def _convolution_flops(convolution: Instruction, computation: Computation) -> float:
    """XLA:TPU writes matrix products as convolutions, a batch as a dilated window dimension.

    Only the positions of the window that lie on an element of the input multiply.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        raise ValueError(f"the convolution {convolution.name} has no dim_labels")
    lhs, rhs = (_operand(convolution, i, computation) for i in (0, 1))
    result = next(arrays_of(convolution.shape))
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    total = 2.0
    for label, size in zip(labels[3], result.dims, strict=True):
        total *= size if label in "bf" else 1
    total *= rhs.dims[labels[2].index("i")]
    for label in filter(str.isdigit, labels[3]):
        total *= _window_positions(
            int(label),
            settings,
            lhs.dims[labels[1].index(label)],
            result.dims[labels[3].index(label)],
        )
    return total


def _window_positions(dim: int, settings: dict[str, str], inputs: int, outputs: int) -> int:
    """Pairs of (output, window element) that meet an input element, along one dimension."""

    def setting(key: str, default: str) -> str:
        return settings[key].split("x")[dim] if key in settings else default

    size, stride = int(setting("size", "1")), int(setting("stride", "1"))
    low = int(setting("pad", "0_0").split("_")[0])
    grown, spread = int(setting("lhs_dilate", "1")), int(setting("rhs_dilate", "1"))
    positions = (
        output * stride - low + element * spread
        for output in range(outputs)
        for element in range(size)
    )
    last = (inputs - 1) * grown
    return sum(0 <= position <= last and position % grown == 0 for position in positions)


def _library_flops(call: Instruction, computation: Computation) -> float:
    """A product that XLA hands to cuBLAS or a kernel; other libraries' products raise."""
    found = re.search(r'custom_call_target="([^"]*)"', call.attributes)
    target = found[1] if found else ""
    if target == "tpu_custom_call":
        return _kernel_flops(call)
    if target.startswith("__cublas$"):
        config = json.loads(
            call.attributes[call.attributes.index("backend_config=") + 15 :].split("\n")[0]
        )
        numbers = config["gemm_backend_config"]["dot_dimension_numbers"]
        contracted = [int(dim) for dim in numbers["lhs_contracting_dimensions"]]
        return _contraction_flops(call, computation, contracted)
    if re.search("gemm|matmul|dot|conv", target, re.IGNORECASE):
        raise ValueError(f"cannot count the FLOPs of the library call {target!r} ({call.name})")
    return 0.0


def _kernel_flops(call: Instruction) -> float:
    """What a Mosaic kernel's author says that it multiplies: its loops depend on what it is given.

    Of `jax.lax.ragged_dot` XLA:TPU says each row once, the rows of no group included.

    Raises:
      ValueError: a kernel that multiplies says nothing of it.
    """
    if said := re.search(r'"cost_estimate":\{[^}]*"flops":"(\d+)"', call.attributes):
        return float(said[1])
    body = re.search(r'"body":"([^"]*)"', call.attributes)
    if body and b"matmul" in base64.b64decode(body[1]):
        raise ValueError(f"the kernel {call.name} multiplies, and has no estimate of its FLOPs")
    return 0.0
