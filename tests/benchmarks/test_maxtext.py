"""What is known of MaxText's kernels and of its arguments; it is not installed here."""

from benchmarks import maxtext
from benchmarks.scale.cases import SCALES
from tests.benchmarks.test_hlo import module


def test_attentions_kernels_multiply_the_blocks_on_and_below_the_diagonal():
    blocks = [(row, column) for row in range(4) for column in range(row + 1)]
    pairs = 16 * len(blocks) * maxtext.BLOCK**2
    found = maxtext.kernels(4 * maxtext.BLOCK)
    assert found["splash_mha_fwd"] == 2 * pairs * 320
    # Backward the scores are made again, for the keys' gradients and for the queries'.
    assert found["splash_mha_dkv"] + found["splash_mha_dq"] == 2 * pairs * (640 + 192 + 320)


def test_the_report_takes_known_kernels_and_tells_the_optimizer_apart():
    text = module(
        """  %gmm.3 = f32[64,4] custom-call(%x), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/while/body/jvp()/gmm"}
  ROOT %r = f32[1000000,1000] all-reduce(%gmm.3), replica_groups={}, to_apply=%add, \
metadata={op_name="jit(step)/vmap()/dot_general"}"""
    )
    model, optimizer = maxtext.report(text, 1024)
    experts = 2 * 6 * 1024 * 2048 * 1408 / 1e12
    assert model == f"model: {experts:,.3f} TFLOPs, sends 0.000 GB"
    assert optimizer == "optimizer: 0.000 TFLOPs, sends 7.000 GB"


def test_mesh_and_batch_are_those_of_our_step():
    given = maxtext.settings(SCALES["v5e-64"], 27, 8192, 2048)
    fsdp, expert = SCALES["v5e-64"].mesh[1:3]
    for asked in (f"ici_fsdp_parallelism={fsdp}", f"ici_expert_parallelism={expert}"):
        assert asked in given
    assert "gradient_accumulation_steps=32" in given and "compile_topology=v5e-64" in given
