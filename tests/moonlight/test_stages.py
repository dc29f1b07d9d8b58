"""The published plan, the same shape at other sizes, and what cannot be planned."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from examples.moonlight import stages
from examples.moonlight.data.sources import parse_mixes, parse_sources
from examples.moonlight.run_folder.branching import parse_branch
from examples.moonlight.schedule.outline import Outline, Ramp, Stage
from examples.moonlight.schedule.plan import Plan
from examples.moonlight.schedule.stages import make_plan, plan_table
from examples.moonlight.training.args import RECIPES, Args, resolve

pytestmark = pytest.mark.one_stack


def plan_of(*, mixes=(), bias_rate: float = 1e-3, **changes) -> Plan:
    recipe = resolve(Args(output_dir=Path(), **changes))
    return make_plan(recipe, bias_rate=bias_rate, mixes=mixes)


def rates(plan: Plan, *steps: int) -> list[float]:
    return np.asarray(plan.learning_rate(np.array(steps))).tolist()


def test_the_published_plan_is_the_papers(capsys, tmp_path: Path):
    plan = stages.show(stages.ShowArgs(png=tmp_path / "plan.png"))
    warmup, decay, end = plan.stage_ends().values()
    doubled, raised = plan.starts[2], plan.starts[4]
    assert [*plan.stage_ends()] == ["warmup", "decay", "cooldown"]
    assert (warmup, raised - decay) == (2000, 100)
    for step, tokens in ((doubled, 200e9), (decay, 5.2e12), (end, 5.7e12)):
        assert plan.tokens(step) == pytest.approx(tokens, abs=2048 * 8192)
    assert plan.tokens(warmup) == pytest.approx(33e9, rel=0.02)
    batches = [(warmup, 2048), (doubled - 1, 2048), (doubled, 4096), (end - 1, 4096)]
    assert all(plan.segment(step).batch == batch for step, batch in batches)
    # The first step already moves, and the last still does.
    assert rates(plan, 0, warmup - 1, warmup) == pytest.approx([2.1e-7, 4.2e-4, 4.2e-4], rel=1e-4)
    assert rates(plan, decay - 1, decay, raised - 1, raised) == pytest.approx(
        [4.2e-5, 4.2e-5 + 5.8e-7, 1e-4, 1e-4], rel=1e-5
    )
    assert rates(plan, end - 1, end) == pytest.approx(
        [1e-4 / (end - raised), 0], rel=1e-3, abs=1e-11
    )
    # Half of the cosine's tokens, not of its steps.
    half = (decay + doubled) // 2 - (doubled - warmup) // 4
    assert plan.tokens(half) == pytest.approx((33.55e9 + 5.2e12) / 2, rel=1e-4)
    assert rates(plan, half) == pytest.approx([(4.2e-4 + 4.2e-5) / 2], rel=1e-4)
    assert [float(plan.bias_rate(s)) for s in (0, decay - 1, decay)] == pytest.approx(
        [1e-3] * 2 + [0]
    )
    printed = capsys.readouterr().out
    assert "175,834 steps, 5,700,008,804,352 tokens" in printed
    assert "160,933" in printed
    assert matplotlib.image.imread(tmp_path / "plan.png").std() > 0.05


def test_a_smaller_plan_has_the_same_shape():
    plan = plan_of(preset="tiny", schedule="moonlight")
    published = plan_of(preset="moonlight-16b-a3b")
    assert plan.tokens(plan.steps) == RECIPES["tiny"].total_tokens
    for ours, theirs in zip(plan.starts, published.starts, strict=True):
        fraction = published.tokens(theirs) / published.tokens(published.steps)
        assert plan.tokens(ours) / plan.tokens(plan.steps) == pytest.approx(fraction, abs=1e-3)
    assert [segment.batch for segment in plan.segments] == [4, 4, 8, 8, 8]
    assert max(rates(plan, *range(plan.steps))) == pytest.approx(4e-3)
    assert plan.segment(plan.steps) == plan.segments[-1]
    longer = plan_of(preset="tiny", schedule="moonlight", warmup_steps=100)
    assert longer.stage_ends()["warmup"] == 100
    assert rates(longer, 0, 99) == pytest.approx([4e-3 * 4 / 464, 4e-3], rel=1e-3)
    assert plan_of(preset="tiny", schedule="moonlight", warmup_steps=0).stage_ends()["decay"]


def test_the_cosine_warms_up_from_its_first_step_and_decays():
    plan = plan_of(learning_rate=1.0, warmup_steps=4, steps=20, bias_rate=5e-4)
    assert rates(plan, 0, 3, 4) == pytest.approx([0.25, 1.0, 1.0])
    assert rates(plan, 19)[0] == pytest.approx(0.1, abs=0.01)
    assert (np.diff(rates(plan, *range(4, 20))) < 0).all()
    assert rates(plan_of(warmup_steps=0, learning_rate=1.0), 0) == [1.0]
    assert float(plan.bias_rate(19)) == pytest.approx(5e-4)
    assert plan_of(steps=600).segments[0].steps == plan_of().segments[0].steps / 2 == 30


def test_a_plan_is_a_function_of_the_traced_step():
    plan = plan_of(schedule="moonlight", warmup_steps=20)
    steps = jnp.arange(plan.steps)
    both = jax.jit(lambda steps: (plan.learning_rate(steps), plan.bias_rate(steps)))(steps)
    for traced, schedule in zip(both, (plan.learning_rate, plan.bias_rate), strict=True):
        np.testing.assert_allclose(traced, schedule(steps), rtol=1e-5)
        assert traced.dtype == jnp.float32


def test_a_cooldown_can_begin_early():
    whole = plan_of(schedule="moonlight", total_tokens=2_000_000)
    plan = plan_of(schedule="moonlight", total_tokens=2_000_000, cooldown_at=500)
    assert plan.stage_ends() == {**whole.stage_ends(), "decay": 500, "cooldown": plan.steps}
    assert plan.steps - 500 == whole.steps - whole.stage_ends()["decay"]
    assert rates(plan, *range(500)) == rates(whole, *range(500))
    rise = plan.segments[-2]
    assert rise.curve.start == rates(whole, 500)[0]
    assert rates(plan, 499 + rise.steps) == pytest.approx([4e-3 / 4.2], rel=1e-5)
    ends = [plan.steps - 1, whole.steps - 1]
    assert rates(plan, ends[0]) == rates(whole, ends[1])
    # While the batch is still the smaller one, too.
    assert plan_of(schedule="moonlight", cooldown_at=10).segment(9).batch == 4


def test_mixes_belong_to_stages():
    one, two = {"general": 1.0}, {"quality": 1.0}
    assert plan_of(mixes=[one]).segments[0].mix == one
    plan = plan_of(schedule="moonlight", mixes=[one, one, two])
    assert [segment.mix for segment in plan.segments] == [one, one, one, two, two]
    recipe = resolve(Args(output_dir=Path(), schedule="moonlight"))
    table = plan_table(plan, recipe)
    assert [*table.columns[-1].cells] == ["1 : 0"] * 3 + ["0 : 1"] * 2
    assert "mix: general : quality" in str(table.caption)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixes": [{}, {}]}, "--mix was given 2 times; give it once, .* each of training"),
        ({"cooldown_at": 3}, "this schedule has one stage, 'training', and no cooldown"),
        (
            {"schedule": "moonlight", "cooldown_at": 2000},
            "can begin after steps 1 to 1137, where the stage 'cooldown' begins; got 2000",
        ),
        ({"schedule": "moonlight", "total_tokens": 3000}, "3,000 tokens are too few .* 5 segments"),
        (
            {"schedule": "moonlight", "warmup_steps": 5000},
            r"the stage 'decay' has -3,[0-9,]+ tokens, fewer than its warmup of 0",
        ),
        ({"total_tokens": 10**13, "sequence_length": 16}, "more than a step can count"),
        ({"schedule": "moonlight", "gradient_accumulation": 3}, "must be even, got 3"),
        ({"schedule": "moonlight", "steps": 12}, "--steps goes with --schedule cosine"),
        ({"total_tokens": 4096, "steps": 4}, "--steps goes with --schedule cosine, and not with"),
        ({"warmup_steps": 12, "steps": 12}, r"--warmup-steps \(12\) must be fewer than --steps"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        plan_of(**changes)


def test_a_batch_is_divided_in_the_ramps_ratio_or_not_at_all():
    outline = Outline(
        (Stage("all", 100, 0, 1.0, 0.1, "linear", 1e-3),), (Ramp(50, 2), Ramp(100, 3)), 1
    )
    sizes = {"sequence_length": 1, "learning_rate": 1.0, "bias_rate": 0.0}
    plan = outline.scaled(1000, max_batch=6, **sizes).plan()
    assert [segment.batch for segment in plan.segments] == [4, 6]
    with pytest.raises(ValueError, match="from 2 to 3 sequences: 4 sequences cannot be divided"):
        outline.scaled(100, max_batch=4, **sizes)


# --- what the command line says of sources --------------------------------------------------------


def test_sources_and_mixes_are_read():
    assert parse_sources(()) == {"": None}
    assert parse_sources(["texts/a=b.txt"]) == {"": Path("texts/a=b.txt")}
    sources = parse_sources(["general=texts", "best-1=a=b.jsonl"])
    assert sources == {"general": Path("texts"), "best-1": Path("a=b.jsonl")}
    assert parse_mixes(["general=9, best-1=.5", "best-1=1"], sources) == [
        {"general": 9.0, "best-1": 0.5},
        {"best-1": 1.0},
    ]
    assert parse_branch("runs/a@b@12") == (Path("runs/a@b"), 12)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: parse_sources(["a", "b=c"]), "--data a: several sources need a name each"),
        (lambda: parse_sources(["b=c", "b=d"]), "--data b=d: several sources need a name"),
        (lambda: parse_mixes(["a=1,c=2"], ["a", "b"]), "cannot read 'c=2'.* are a, b"),
        (lambda: parse_mixes(["a=1,a=2"], ["a"]), "cannot read 'a=2'. Write the weight"),
        (lambda: parse_mixes(["a=-1"], ["a"]), "cannot read 'a=-1'"),
        (lambda: parse_mixes(["a=x"], ["a"]), "cannot read 'a=x'"),
        (lambda: parse_mixes(["a=0"], ["a"]), "--mix a=0: no source has a weight above 0"),
        (lambda: parse_branch("runs/a"), "--branch-from runs/a: write RUN@STEP"),
        (lambda: parse_branch("@7"), "write RUN@STEP"),
    ],
)
def test_what_cannot_be_read_is_refused(read, message: str):
    with pytest.raises(ValueError, match=message):
        read()
