"""From one step on lists of leaves to a transformation of trees, with a state that stays as it is.

A leaf whose gradient is None or masked keeps that for an update, and its state.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Inexact

from muon_jax._common.dtypes import promote
from muon_jax._common.paths import is_absent
from muon_jax._common.trees import PyTree
from muon_jax._leaves import Leaf, new_count, new_zeros
from muon_jax._mesh.zero1 import Zero1

Arrays = list[Inexact[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class Step(abc.ABC):
    """An optimizer's step, of leaves of which it is known what they hold and where they lie.

    Attributes:
      zero1: the mesh that shares the work and the state, if any.
      mu_dtype: the dtype that the first moment is asked to have, if any.
      state: makes the state, a NamedTuple, of a count and of `kept` trees like the parameters.
      kept: how many arrays are kept for each leaf.
    """

    zero1: Zero1 | None
    mu_dtype: jnp.dtype | None
    state: ClassVar[Callable[..., Any]]
    kept: ClassVar[int]

    @abc.abstractmethod
    def moments(self, param: jnp.dtype) -> tuple[jnp.dtype, ...]:
        """The dtypes of the arrays that are kept for a parameter of this dtype."""

    @abc.abstractmethod
    def run(
        self, count: Any, leaves: list[Leaf], dtypes: list[Any], gradients: Arrays, *kept: Arrays
    ) -> Sequence[Arrays]:
        """The updates of some leaves, and what is kept for them from now on.

        Args:
          count: the number of steps so far.
          leaves: what each leaf holds, and where it lies.
          dtypes: the dtype of each leaf's parameter and gradient, promoted.
          gradients: one gradient for each leaf.
          *kept: one array for each leaf, for each of its `moments`.
        """

    def on(self, leaves: Sequence[Leaf]) -> optax.GradientTransformation:
        """The transformation of the trees that have these leaves."""

        def init(params: PyTree) -> Any:
            arrays, structure = jax.tree.flatten(params)
            dtypes = [self.moments(jnp.result_type(x)) for x in arrays]
            trees = [
                structure.unflatten(new_zeros(self.zero1, arrays, leaves, [d[i] for d in dtypes]))
                for i in range(self.kept)
            ]
            return self.state(new_count(self.zero1), *trees)

        def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
            count, *trees = state
            structure = jax.tree.structure(trees[0])
            columns = [structure.flatten_up_to(updates), *map(jax.tree.leaves, trees)]
            like = columns[0] if params is None else structure.flatten_up_to(params)
            present = [i for i, gradient in enumerate(columns[0]) if not is_absent(gradient)]
            given = [[column[i] for i in present] for column in columns]
            dtypes = [
                promote(jnp.result_type(columns[0][i]), jnp.result_type(like[i])) for i in present
            ]
            new = self.run(count, [leaves[i] for i in present], dtypes, *given)
            for column, values in zip(columns, new, strict=True):
                for i, value in zip(present, values, strict=True):
                    column[i] = value
            updates, *trees = map(structure.unflatten, columns)
            return updates, self.state(jnp.asarray(optax.safe_increment(count)), *trees)

        return optax.GradientTransformation(init, update)
