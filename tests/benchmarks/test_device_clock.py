"""Times on the device are read from the events of a trace, here of one that is written out."""

import jax
import pytest
from jax.profiler import ProfileData

from benchmarks import device_clock, peaks
from benchmarks.device_clock import WALL, choose_clocks, device_span


def plane(name, lines):
    """A plane of an XSpace as text: line -> (start, duration) in microseconds."""
    text = f'planes {{ id: 1 name: "{name}"\n'
    for number, (line, events) in enumerate(lines.items()):
        text += f'lines {{ id: {number} name: "{line}" timestamp_ns: 1000\n'
        for start, duration in events:
            text += f"events {{ metadata_id: 1 offset_ps: {start}000000 duration_ps: "
            text += f"{duration}000000 }}\n"
        text += "}\n"
    return text + "}\n"


def profile(*planes):
    return ProfileData.from_serialized_xspace(
        ProfileData.text_proto_to_serialized_xspace("".join(planes))
    )


HOST = plane("/host:CPU", {"python": [(0, 900)]})


def test_a_gpu_s_streams_are_read_together_and_the_host_is_not():
    gpu = plane(
        "/device:GPU:0", {"Stream #13(Compute)": [(5, 7), (20, 7)], "Stream #14": [(25, 9)]}
    )
    assert device_span(profile(HOST, gpu)) == pytest.approx(29e-6)


def test_a_tpu_s_programs_count_and_its_steps_do_not():
    tpu = plane("/device:TPU:0", {"Steps": [(0, 500)], "XLA Modules": [(10, 30), (50, 20)]})
    assert device_span(profile(tpu, HOST)) == pytest.approx(60e-6)


def test_the_busiest_device_counts():
    two = [plane(f"/device:GPU:{i}", {"Stream #1": [(5, 7 + i)]}) for i in range(2)]
    assert device_span(profile(*two)) == pytest.approx(8e-6)


@pytest.mark.parametrize("planes", [(HOST,), (plane("/device:GPU:0", {"Other": [(1, 1)]}),)])
def test_a_trace_without_a_device_says_so(planes):
    with pytest.raises(LookupError, match="no event of a device"):
        device_span(profile(*planes))


def test_on_cpu_both_sides_have_the_wall_clock(monkeypatch):
    assert choose_clocks() is WALL
    # As on an accelerator whose profile shows nothing: the trace of this product is real.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_clocks() is WALL


def test_clocks_are_given_by_side():
    clocks = device_clock.Clocks("both", jax=lambda call: 1.0, torch=lambda call: 2.0)
    assert [clocks.of(["optax", "torch"])[name](None) for name in ("optax", "torch")] == [1, 2]


def test_limits_are_work_over_the_fastest_time():
    times = iter([4.0, 2.0, 8.0] * 2)
    fastest = peaks.matmul_peak("float32", (8, 16), repeats=3, clock=lambda call: next(times))
    assert fastest == 2 * 16**3 / 2.0
    copied = peaks.copy_bandwidth(400, repeats=1, clock=lambda call: 0.5)
    assert copied == 2 * 400 / 0.5


def test_the_fastest_of_the_peaks_counts():
    measured = [{"float32": 20.0, "bfloat16": 30.0}, {"float32": 10.0, "bfloat16": 40.0}]
    assert peaks.highest(*measured) == {"float32": 20.0, "bfloat16": 40.0}
    assert peaks.shares_of(60.0, 2.0, peaks.highest(*measured)) == {
        "float32": 1.5,  # its products have fewer bits to multiply
        "bfloat16": 0.75,
    }


def test_there_is_no_share_of_a_peak_that_was_not_reached():
    measured = {"float32": 20.0, "bfloat16": 40.0}
    assert peaks.shares_of(90.0, 2.0, measured) == {"float32": None, "bfloat16": None}
