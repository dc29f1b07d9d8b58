"""The generator: cached equals uncached, rows that do not see each other, and no recompilation."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.moonlight.generation.decoding import Generator
from examples.moonlight.generation.sampling import Sampling, draw, likeliest
from examples.moonlight.huggingface.pretrained import abstract_model, load_pretrained
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import ModelSharding, make_mesh
from tests.moonlight import hf_toy

CONFIG = dataclasses.replace(hf_toy.MOONLIGHT, vocab_size=300, max_position_embeddings=64)
LENGTH, CHUNK = 40, 4
DRAWING = Sampling(temperature=1.5, top_k=100, top_p=0.9, seed=3)

# Chunks end inside, at and behind the ends of these.
PROMPTS = [np.random.default_rng(n).integers(0, 300, n).tolist() for n in (3, 13, 8)]


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    return hf_toy.write_model(folder, CONFIG, hf_toy.hard_tensors(CONFIG))


def build(folder: Path, sharding: ModelSharding, **changes) -> Generator:
    execution = Execution(sharding=sharding)
    _, params, bias = load_pretrained(folder, execution)
    graphdef, *_ = abstract_model(CONFIG, execution)
    settings = {"batch": 3, "length": LENGTH, "chunk": CHUNK, "sampling": DRAWING} | changes
    return Generator(graphdef, params, bias, sharding=sharding, **settings)


@pytest.fixture(scope="module", name="generator")
def _generator(folder: Path) -> Generator:
    return build(folder, ModelSharding())


@pytest.fixture(scope="module", name="model")
def _model(folder: Path) -> nnx.Module:
    _, params, bias = load_pretrained(folder)
    return nnx.merge(abstract_model(CONFIG, Execution())[0], params, bias)


@pytest.fixture(scope="module", name="logits")
def _logits(model):
    """Uncached logits of ragged rows: `[rows, LENGTH, vocab]`, of which each row has its own."""
    forward = jax.jit(lambda tokens_bt: model(tokens_bt)[0])

    def logits(rows: list[list[int]]) -> np.ndarray:
        padded = np.zeros((3, LENGTH), np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return np.asarray(forward(padded))

    return logits


def collect(steps: Iterator[list[int | None]]) -> list[list[int]]:
    rows = [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
    assert rows
    return rows


def run(generator: Generator, prompts=PROMPTS, **settings) -> list[list[int]]:
    arguments: dict[str, Any] = {"max_new_tokens": 20} | settings
    return collect(generator.stream(prompts, **arguments))


# --------------------------------------------------------------------------------------------------
# Cached is uncached
# --------------------------------------------------------------------------------------------------


def test_rows_of_any_length_are_drawn_as_from_the_model_without_a_cache(generator, logits):
    rows = run(generator)
    logits_btv = logits([prompt + row for prompt, row in zip(PROMPTS, rows, strict=True)])
    for number, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        assert len(row) == 20
        position_t = len(prompt) + jnp.arange(20)
        drawn_t = draw(
            logits_btv[number, position_t - 1], DRAWING, jnp.full(20, number), position_t
        )
        assert row == drawn_t.tolist()


def test_decoding_gives_the_logits_of_the_model_without_a_cache(model, logits):
    @jax.jit
    def decode(tokens_bt, cache, start_b):
        act_nd, cache = model.decode(tokens_bt, cache, start_b)
        return model.logits(act_nd).reshape(*tokens_bt.shape, -1), cache

    rng = np.random.default_rng(0)
    rows = rng.integers(0, 300, (3, LENGTH)).astype(np.int32)
    ours = np.zeros((3, LENGTH, 300), np.float32)
    # Rows at different places, chunks that overlap what was written, and single tokens.
    cache, start_b = model.init_cache(3, LENGTH), np.zeros(3, np.int32)
    for width, steps in ((5, [3, 5, 4]), (5, [5, 2, 5]), (5, [5, 5, 5]), *10 * [(1, [1, 1, 1])]):
        columns = start_b[:, None] + np.arange(width)
        step_b = np.array(steps, np.int32)
        real = np.arange(width) < step_b[:, None]
        tokens = np.where(real, np.take_along_axis(rows, columns, axis=1), 7)
        out, cache = decode(tokens, cache, start_b)
        for row in range(3):
            at = slice(start_b[row], start_b[row] + step_b[row])
            ours[row, at] = np.asarray(out)[row, : step_b[row]]
        start_b += step_b
    assert start_b.tolist() == [23, 22, 24]
    theirs = logits(rows.tolist())
    for row, end in enumerate(start_b):
        np.testing.assert_allclose(ours[row, :end], theirs[row, :end], rtol=2e-5, atol=2e-5)


def test_a_conversation_goes_on_from_the_cache(generator):
    said = run(generator, [PROMPTS[1]], max_new_tokens=6)[0]
    before = generator.speed.prefill_tokens
    # The last answer as the template repeats it, but for its end; then three tokens more.
    question = [*PROMPTS[1], *said[:5], 1, 2, 3]
    kept = run(generator, [question], max_new_tokens=8, keep=True)
    assert generator.speed.prefill_tokens - before == 3
    assert run(generator, [question], max_new_tokens=8) == kept
    # All of it is there: the last token is read again, for what follows it.
    again = collect(generator.stream([question], max_new_tokens=8, keep=True))
    assert again == kept


def test_a_mesh_draws_the_same_tokens(folder, generator):
    mesh = ModelSharding(make_mesh("data=2,expert=2,tensor=2"))
    # Three rows are no multiple of four shards; chunks of one token are the decoding program.
    spread = build(folder, mesh, chunk=1)
    assert run(spread, max_new_tokens=6) == run(generator, max_new_tokens=6)


# --------------------------------------------------------------------------------------------------
# Rows, ends, compilations
# --------------------------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_the_others(generator):
    first, second, third = run(generator)
    assert run(generator, [PROMPTS[1]], first_row=1) == [second]
    assert run(generator, [[5] * 17, PROMPTS[1], PROMPTS[0]])[1] == second
    assert run(generator, [PROMPTS[1]], first_row=7) != [second]
    # The same text twice is drawn twice.
    assert len({tuple(row) for row in run(generator, 3 * [PROMPTS[0]])}) == 3
    assert run(generator) == [first, second, third]


def test_texts_end_at_a_stop_token_or_where_the_cache_does(generator):
    rows = run(generator)
    stop = rows[1][4]
    stopped = run(generator, stop_ids={stop})
    for row, short in zip(rows, stopped, strict=True):
        assert short == (row[: row.index(stop)] if stop in row else row)
    assert len(stopped[1]) <= 4
    # Each step says of each row whether it has ended.
    steps = list(generator.stream([[1] * 38, [2] * 30], max_new_tokens=5))
    assert [[token is not None for token in step] for step in steps] == [
        [True, True], [True, True], [False, True], [False, True], [False, True],
    ]  # fmt: skip
    assert len(list(generator.stream([[1], [2]], max_new_tokens=1))) == 1


def test_nothing_is_compiled_for_another_length(generator):
    compilations = []

    def listen(event: str, duration_secs: float, **_) -> None:
        del duration_secs
        if "compile" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(generator, [[1]], max_new_tokens=2)
        run(generator, [[1] * 5, [2] * 17, [3] * 33], max_new_tokens=9)
        run(generator, [[1] * 5, [2] * 18], max_new_tokens=9, keep=True)
        assert compilations == []
        jax.jit(lambda x: x + 1)(0)
        assert compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_speed_counts_the_tokens_of_the_texts(generator):
    before = dataclasses.replace(generator.speed)
    run(generator, stop_ids={run(generator)[1][4]})
    after = generator.speed
    assert after.prefill_tokens - before.prefill_tokens == 2 * sum(map(len, PROMPTS))
    assert 3 * 19 < after.decode_tokens - before.decode_tokens < 2 * 3 * 19
    assert after.prefill_seconds > before.prefill_seconds
    assert after.decode_seconds > before.decode_seconds
    assert "decode" in str(after) and "compiled in" in str(after)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "expected 1 to 3 prompts, got 0"),
        (4 * [[1]], {}, "expected 1 to 3 prompts, got 4"),
        ([[1], []], {}, "prompt 2 is empty: give at least a character"),
        ([[1] * 40], {}, "prompt 1 has 40 tokens, .* texts of at most 40, .*: shorten it"),
        ([[1]], {"max_new_tokens": 0}, "--max-new-tokens must be positive, got 0"),
    ],
)
def test_what_cannot_be_continued_is_refused(generator, prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        run(generator, prompts, **changes)


@pytest.mark.parametrize("name", ["batch", "length", "chunk"])
def test_sizes_are_positive(folder, name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        build(folder, ModelSharding(), **{name: 0})


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------


def frequencies(sampling: Sampling, draws: int = 20_000) -> np.ndarray:
    logits_bv = jnp.broadcast_to(jnp.log(jnp.array([0.1, 0.4, 0.05, 0.3, 0.15])), (draws, 5))
    position_b = jnp.arange(draws)
    tokens_b = draw(logits_bv, sampling, jnp.zeros_like(position_b), position_b)
    return np.bincount(tokens_b, minlength=5) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(0.5), np.square([0.1, 0.4, 0.05, 0.3, 0.15]) / 0.285),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(1.0, top_k=9), [0.1, 0.4, 0.05, 0.3, 0.15]),
        # 0.4 and 0.3 reach 0.7 but not 0.72; after top-k, 0.4 is 4/7 of what there is.
        (Sampling(1.0, top_p=0.72), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        (Sampling(1.0, top_k=2, top_p=0.57), [0, 1, 0, 0, 0]),
        (Sampling(1.0, top_p=1e-6), [0, 1, 0, 0, 0]),
        # The temperature comes before top-p: squared, 0.4 alone is 0.56.
        (Sampling(0.5, top_p=0.5), [0, 1, 0, 0, 0]),
        (Sampling(0.0, top_k=3, top_p=0.1), [0, 1, 0, 0, 0]),
    ],
)
def test_draws_have_the_probabilities_of_the_filters(sampling, expected):
    np.testing.assert_allclose(frequencies(sampling), expected, atol=0.012)


def test_draws_follow_seed_row_and_position_alone():
    logits_bv = jnp.zeros((64, 300))
    rows, positions = jnp.arange(64) // 8, jnp.arange(64) % 8
    one = draw(logits_bv, Sampling(1.0, seed=1), rows, positions)
    assert len(set(one.tolist())) > 40
    back = draw(logits_bv, Sampling(1.0, seed=1), rows[::-1], positions[::-1])
    np.testing.assert_array_equal(back[::-1], one)
    assert (draw(logits_bv, Sampling(1.0, seed=2), rows, positions) != one).sum() > 50
    kept, ids = likeliest(logits_bv, Sampling(1.0, top_k=7))
    assert kept.shape == ids.shape == (64, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, r"--temperature must be 0 \(greedy\) or a positive number"),
        ({"temperature": float("nan")}, r"--temperature must be 0 .* got nan"),
        ({"top_k": 0}, "--top-k must be at least 1, got 0; leave it out"),
        ({"top_p": 0.0}, "--top-p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "--top-p must be above 0 and at most 1, which keeps every token; got 1.5"),
        ({"seed": -1}, r"--seed must be between 0 and 2\^32 - 1, got -1"),
    ],
)
def test_sampling_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**changes)
