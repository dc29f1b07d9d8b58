"""Where the entries of a parameter lie: the reader's digits against the program itself, run.

The oracle is the program: given a leaf that holds its own indices, it shows where each entry goes.
"""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

import muon_jax._routing.use.program  # noqa: F401 (registers the rules)
from muon_jax._routing.use.atoms import Digit, Gap, Part, length
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.reader import Reader
from muon_jax._routing.use.values import parameter


def view_of(program, *shapes):
    """The views of a program's only result, and what the reader noted."""
    jaxpr = jax.make_jaxpr(program)(*(jnp.zeros(shape) for shape in shapes))
    reader = Reader(shapes)
    values = [
        parameter(leaf, shape, tuple((Label(size),) for size in shape))
        for leaf, shape in enumerate(shapes)
    ]
    (out,) = reader.run(jaxpr, values)
    notes = [note.text for notes in reader.notes.values() for note in notes]
    return out, notes


def places(atom_axis, axes_of_leaf):
    """For each entry of one axis, the leaf's index along each axis as far as it says; or None."""
    out = []
    for index in np.ndindex(*(atom.size for atom in atom_axis)):
        total = [0] * axes_of_leaf
        here = True
        for i, atom in zip(index, atom_axis, strict=True):
            if isinstance(atom, Digit):
                total[atom.axis] += atom.base + atom.stride * i
            elif isinstance(atom, Part):
                inner = places(atom.atoms, axes_of_leaf)
                inside = atom.lo <= i < atom.lo + length(atom.atoms)
                here &= inside
                if inside:
                    total = [a + b for a, b in zip(total, inner[i - atom.lo], strict=True)]
            else:
                assert isinstance(atom, Gap)
        out.append(total if here else None)
    return out


def entries(view, shape):
    """The leaf's flat index at each place of the value; -1 where it is not."""
    rank = len(view.lengths)
    fixed = [0] * rank
    for taken in view.taken:
        fixed[taken.axis] += taken.base
    axes = [places(axis, rank) if axis else [[0] * rank] for axis in view.axes]
    out = np.full(shape, -1)
    for index in itertools.product(*(range(size) for size in shape)):
        parts = [axes[i][n] for i, n in enumerate(index)]
        if all(part is not None for part in parts):
            where = [sum(x) for x in zip(fixed, *parts, strict=True)]
            out[index] = np.ravel_multi_index(where, view.lengths)
    return out


def check(program, shape):
    """The one view of the result is where the program puts the entries."""
    out, notes = view_of(program, shape)
    leaf = jnp.arange(1.0, 1 + np.prod(shape)).reshape(shape)
    expected = np.asarray(program(leaf)).astype(int) - 1
    (view,) = out.views
    assert out.shape == expected.shape
    np.testing.assert_array_equal(entries(view, out.shape), expected)
    assert not notes


PRIMITIVES = {
    "reshape, cut": lambda w: w.reshape(4, 2, 3, 2),
    "reshape, join": lambda w: w.reshape(48),
    "reshape, both": lambda w: w.reshape(2, 24),
    "transpose": lambda w: w.T,
    "transpose of pieces": lambda w: w.reshape(2, 4, 6).transpose(2, 0, 1),
    "joined after a transposition": lambda w: w.reshape(2, 4, 6).transpose(1, 0, 2).reshape(8, 6),
    "broadcast": lambda w: jnp.broadcast_to(w[None, :, None], (3, 8, 2, 6)),
    "squeeze": lambda w: jnp.squeeze(w[None, :, None], (0, 2)),
    "slice": lambda w: w[2:5, 1:],
    "slice with steps": lambda w: w[::2, 1::2],
    "one place": lambda w: w[3],
    "one place of a piece": lambda w: w.reshape(8, 3, 2)[:, 1],
    "slice of joined axes": lambda w: w.reshape(48)[12:24].reshape(2, 6),
    "rev": lambda w: lax.rev(w, (0,)),
    "rev of pieces": lambda w: lax.rev(w.reshape(4, 2, 6).transpose(1, 0, 2).reshape(8, 6), (0,)),
    "split": lambda w: jnp.split(w, 2, axis=1)[1],
    "tile": lambda w: jnp.tile(w, (2, 1)),
    "repeat": lambda w: jnp.repeat(w, 2, axis=0),
    "pad": lambda w: lax.pad(w, 0.0, ((1, 2, 0), (0, 0, 0))),
    "pad by less": lambda w: lax.pad(w, 0.0, ((-1, 2, 0), (3, -2, 0))),
    "concatenate with zeros": lambda w: jnp.concatenate([jnp.zeros((2, 6)), w]),
    "slice of a concatenation": lambda w: jnp.concatenate([jnp.zeros((2, 6)), w])[1:5],
    "stack": lambda w: jnp.stack([jnp.zeros((8, 6)), w], axis=1),
    "unstack": lambda w: lax.unstack(w, axis=1)[2] if hasattr(lax, "unstack") else w[:, 2],
    "moveaxis": lambda w: jnp.moveaxis(w.reshape(2, 4, 6), 1, 0),
    "swapaxes": lambda w: jnp.swapaxes(w, 0, 1),
    "convert": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
    "copy": lambda w: w.copy(),
    "stop_gradient": lax.stop_gradient,
    "barrier": lambda w: lax.optimization_barrier(w),
    "jit": lambda w: jax.jit(lambda w: w.T)(w),
    "remat": lambda w: jax.checkpoint(lambda w: w.T)(w),
    "cond": lambda w: lax.cond(True, lambda w: w.T, lambda w: w.T, w),
    "scan that keeps": lambda w: lax.scan(lambda c, x: (c, x), 0.0, w)[1],
    "scan along axis 1": lambda w: lax.scan(lambda c, x: (c, x), 0.0, w.T)[1].T,
    "map": lambda w: lax.map(lambda x: x[::-1], w),
    "vmap": lambda w: jax.vmap(lambda x: x.reshape(2, 3).T)(w),
    "carried": lambda w: lax.fori_loop(0, 3, lambda i, c: c, w),
    "static gather": lambda w: lax.dynamic_slice(w, (0, 0), (8, 6)),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_each_primitive_moves_the_entries_as_the_program_does(name):
    check(PRIMITIVES[name], (8, 6))


@st.composite
def chains(draw):
    """A shape and a chain of reshapes, transpositions and slices."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=3)))
    steps, now = [], shape
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["reshape", "transpose", "slice", "rev", "expand"]))
        if kind == "reshape":
            size, new = int(np.prod(now)), []
            while size > 1 and len(new) < 3:
                factor = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
                new.append(factor)
                size //= factor
            now = (*new, size)
            steps.append(lambda x, to=now: x.reshape(to))
        elif kind == "transpose":
            order = draw(st.permutations(range(len(now))))
            now = tuple(now[i] for i in order)
            steps.append(lambda x, order=tuple(order): x.transpose(order))
        elif kind == "slice":
            axis = draw(st.integers(0, len(now) - 1))
            start = draw(st.integers(0, now[axis] - 1))
            stop = draw(st.integers(start + 1, now[axis]))
            step = draw(st.integers(1, 2))
            index = (*[slice(None)] * axis, slice(start, stop, step))
            now = (*now[:axis], len(range(start, stop, step)), *now[axis + 1 :])
            steps.append(lambda x, index=index: x[index])
        elif kind == "rev":
            axis = draw(st.integers(0, len(now) - 1))
            index = (*[slice(None)] * axis, slice(None, None, -1))
            steps.append(lambda x, index=index: x[index])
        else:
            axis = draw(st.integers(0, len(now)))
            now = (*now[:axis], 1, *now[axis:])
            index = (*[slice(None)] * axis, None)
            steps.append(lambda x, index=index: x[index])

    def program(x):
        for step in steps:
            x = step(x)
        return x

    return shape, program


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(chains())
def test_random_chains_are_followed_or_said_to_be_lost(case):
    shape, program = case
    out, notes = view_of(program, shape)
    expected = program(np.arange(np.prod(shape)).reshape(shape))
    if not out.views:
        # Lost aloud, unless what is left varies along one axis of the leaf at most.
        index = np.stack(np.unravel_index(expected.ravel(), shape))
        assert notes or sum(len({*row}) > 1 for row in index) < 2
        return
    (view,) = out.views
    np.testing.assert_array_equal(entries(view, out.shape), expected)
