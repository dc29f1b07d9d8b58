"""What a compiled program holds in a device's memory, by its compiler's account."""

import jax


def sizes_of(compiled: jax.stages.Compiled, platform: str) -> dict[str, int]:
    """Bytes of one device by what holds them: arguments, outputs, temporaries, code.

    Outputs that take the place of arguments are not counted again.

    On TPUs temporaries are what else is alive at the peak. libtpu 0.0.42.1 has a field for them,
    but it is no size of the program's: of two toys it said 4.84 and 9.42 GB, where the buffers that
    were laid out took 3.50 and 9.14. (Those, with arguments and outputs, are the "Total bytes" of
    the memory report that `XLA_FLAGS=--xla_dump_to=FOLDER` makes, and what the compiler compares
    with the device's memory when it refuses a program. Gaps between buffers are in that number, but
    not in the peak: 11.75 GB and 11.54 for a step of Moonlight-16B on 256 chips.) On CPUs and GPUs
    the field is right, and the peak knows nothing of temporaries.

    Raises:
      ValueError: the compiler gives no account.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        raise ValueError(f"the {platform} compiler does not account for the program's memory")
    arguments = memory.argument_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    if platform == "tpu":
        temporaries = max(memory.peak_memory_in_bytes - arguments - outputs, 0)
    return {
        "arguments": arguments,
        "outputs": outputs,
        "temporaries": temporaries,
        "code": memory.generated_code_size_in_bytes,
    }
