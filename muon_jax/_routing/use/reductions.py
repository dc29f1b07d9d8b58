"""Rules for sums, and other reductions, over axes."""

import dataclasses
from typing import Any

from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.operands import check_by_hand
from muon_jax._routing.use.reader import Reader, ints, rule
from muon_jax._routing.use.values import Value, labels_in

_REDUCTIONS = [
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
    "reduce_xor", "argmax", "argmin",
]  # fmt: skip


@rule(*_REDUCTIONS)
def reduce(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """Sums, or the like, over some axes."""
    gone, is_sum = {*ints(eqn.params["axes"])}, eqn.primitive.name == "reduce_sum"
    return [reduced(reader, value, gone, is_sum) for value in values]


def reduced(reader: Reader, value: Value, gone: set[int], is_sum: bool) -> Value:
    """A value without the axes that a reduction took."""
    kept = [i for i in range(len(value.shape)) if i not in gone]
    # Norms and penalties sum over all that a parameter made, experts leave their outputs.
    stays = any(label.is_made for label in labels_in(*(value.axes[i] for i in kept)))
    for label in labels_in(*(value.axes[i] for i in gone)):
        if is_sum and stays and not value.exponential:
            label.add(("added",))
        if value.exponential:
            label.add(("softmax",))
    # What a one-hot code leaves of an axis is one entry, as a label of the loss: nothing is summed.
    for label in labels_in(*(value.axes[i] for i in gone - value.single)) if is_sum else ():
        for event in [*label.root.events]:
            if event[0] == "scaled" and event[1] & value.pending:
                reader.close(event[1] & value.pending)
    if any(value.shape[i] > 1 for i in kept):
        Label.join(labels_in(*(value.axes[i] for i in gone)), ("joint",))
    views = []
    for view in value.views:
        summed = {digit.axis for i in gone for digit in view.digits(view.axes[i])}
        view = dataclasses.replace(view, contracted=view.contracted | summed)
        check_by_hand(reader, view)
        views.append(view.replace_axes(view.axes[i] for i in kept))
    return dataclasses.replace(
        value,
        shape=tuple(value.shape[i] for i in kept),
        axes=tuple(value.axes[i] for i in kept),
        views=tuple(views),
        onehot=frozenset(),
        single=frozenset(),
        counts=frozenset(),
        indicator=False,
        codes=frozenset(kept.index(i) for i in value.onehot | value.codes if i in kept),
        exponential=False,
    )
