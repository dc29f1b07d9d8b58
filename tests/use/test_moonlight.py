"""The example's models, read from their own loss: as their names have it, however they are run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from examples.moonlight.huggingface.pretrained import abstract_model
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.language_model import next_token_loss
from examples.moonlight.training.routing import read_roles
from muon_jax import MuonDimensionNumbers, by_path, by_use
from muon_jax._routing.route_leaves import route_leaves
from tests.use.use_programs import verdicts

TINY = MoonlightConfig.preset("tiny")


def read_as(config, execution, **options):
    graphdef, params, bias = abstract_model(config, execution)

    def loss(params, bias, tokens_bt):
        return next_token_loss(nnx.merge(graphdef, params, bias), tokens_bt)

    return by_use(loss, params, bias, jax.ShapeDtypeStruct((2, 9), jnp.int32), **options)


def routes(config, roles):
    _, params, _ = abstract_model(config, Execution())
    return {
        route.path: (route.optimizer, route.views and [view.matrices for view in route.views])
        for route in route_leaves(params, roles)[0]
    }


def test_the_example_is_routed_as_before():
    assert routes(TINY, read_roles(TINY)) == routes(TINY, None)


RUNS = {
    "bfloat16, in blocks": {
        "dtype": jnp.bfloat16, "attention_block": 4, "loss_block": 4, "monitor": True
    },
    "unrolled, remat, with a capacity": {"unroll": True, "remat": True, "expert_capacity": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_how_it_is_run_does_not_matter(name):
    run = dataclasses.replace(Execution(experts="ragged"), **RUNS[name])
    assert verdicts(read_as(TINY, run)) == verdicts(read_roles(TINY))


def test_the_dense_route_asks_of_the_experts_alone():
    run = Execution(experts="dense")
    with pytest.raises(ValueError, match=r"3 parameter(?s:.*)down_proj(?s:.*)gate_proj") as error:
        read_as(TINY, run)
    assert str(error.value).count("\n  layers/") == 3
    declared = by_path({r"mlp/experts/": MuonDimensionNumbers(-2, -1)})
    roles = read_as(TINY, run, declared=declared)
    assert routes(TINY, roles) == routes(TINY, None)
