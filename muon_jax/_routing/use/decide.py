"""From what was seen of a parameter to its role: known, or in doubt.

Doubt is the default. A role is given where all that was seen of a parameter agrees on it, and where
several axes could be one matrix or a stack, only with evidence from the activations:

- Several axes that stay after a product are heads if a product of activations with activations, as
  in attention, runs along some and sums over another; they are a stack and an output if another
  parameter's product runs along the one and sums over the other, and the one is then added up by
  itself, as with experts, or all products behind run along it, as with an ensemble's members.
- Several axes that a product sums over are one input if they come from such attention, or from the
  batch itself.
- An axis that is indexed place by place, or scanned, is a stack, unless the places may be heads or
  tiles (`places`).
- A matrix without another behind it is the head, unless its outcome is summed against something
  that no parameter's product made: a frozen head, a vector, rows of a table.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from optax.contrib import MuonDimensionNumbers

from muon_jax._matrices import FusedBlocks, MatrixSpec
from muon_jax._routing.roles import Question
from muon_jax._routing.use.apart import Apart
from muon_jax._routing.use.doubts import Doubt
from muon_jax._routing.use.events import equations, is_added_up, is_attention, is_made, roles_in
from muon_jax._routing.use.hints import heads_of, hints_of
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.places import Places
from muon_jax._routing.use.reader import Meeting, Reader, Use
from muon_jax._routing.use.readings import Role
from muon_jax._routing.use.values import Value
from muon_jax._routing.use.words import describe


class Verdict(NamedTuple):
    """What is decided of a parameter; the fields are those of `Reading`."""

    role: Role
    reason: str
    spec: MatrixSpec | None = None
    hints: tuple[str, ...] = ()
    head_axes: tuple[int, ...] = ()
    becomes: tuple[int, int] | None = None


RAVELLED = "one axis, which the program cuts into matrices"

Axes = tuple[int, ...]


class Judge:
    """Decides the role of each parameter of a program that was read."""

    def __init__(self, reader: Reader, labels: Sequence[Sequence[Label]], loss: Value):
        self.reader = reader
        self.labels = labels
        self.loss = loss
        self.live = self._live()
        self.uses: dict[int, list[Use]] = {}
        for uses in reader.uses.values():
            for use in uses:
                if self.live >> use.product & 1:
                    self.uses.setdefault(use.leaf, []).append(use)
        self.places = Places(reader)
        self.apart = Apart(reader, self.live)
        self.notes: dict[int, dict[str, list[str]]] = {}
        for notes in reader.notes.values():
            for note in notes:
                texts = self.notes.setdefault(note.leaf, {}).setdefault(note.kind, [])
                if note.text not in texts:
                    texts.append(note.text)
        self.attention = {
            place: meeting for place, meeting in reader.meetings.items() if is_attention(meeting)
        }

    def _live(self) -> int:
        """The products whose outcome reaches the loss, as bits."""
        live, before = self.loss.pending, -1
        while live != before:
            before = live
            for number in reversed(range(len(self.reader.followers))):
                if self.reader.followers[number] & live:
                    live |= 1 << number
        return live

    def verdict(self, leaf: int) -> Verdict:
        """The role of one parameter.

        Raises:
          Doubt: where it is not known, with what was seen.
        """
        shape, notes = self.reader.shapes[leaf], self.notes.get(leaf, {})
        if sum(size > 1 for size in shape) < 2:
            reason = "one axis" if shape else "scalar"
            if leaf in self.reader.cut:
                return Verdict("vector", RAVELLED)
            return Verdict("vector", "of one row or column" if len(shape) > 1 else reason)
        if "doubt" in notes:
            raise Doubt("; ".join(notes["doubt"]))
        uses = self.uses.get(leaf, [])
        if not uses:
            return self._without_product(leaf, notes)
        followed = [use for use in uses if self._is_followed(use)]
        if "rows" in notes:
            if followed:
                raise Doubt("rows by index, and a product with other matrices behind it")
            return Verdict("embedding", "rows by index, tied to the head")
        if "elementwise" in notes:
            raise Doubt("a product, and also added or multiplied entry by entry")
        if not followed:
            closed = functools.reduce(int.__or__, self.reader.closed.values(), 0)
            if any(closed >> use.product & 1 for use in uses):
                raise Doubt(
                    "no trained matrix after it, but its outcome is summed against something else: "
                    "the head, or hidden before a frozen one?"
                )
            return Verdict("head", "no matrix after it")
        hints = []
        if any(self.loss.pending >> use.product & 1 for use in uses):
            hints.append("also straight to the loss")
        readings = [self._axes(use) for use in uses]
        if any(reading != readings[0] for reading in readings):
            seen = "; ".join(
                dict.fromkeys(describe(ins, outs, stack) for ins, outs, stack, _ in readings)
            )
            raise Doubt(f"used in different ways: {seen}")
        ins, outs, stack, heads = readings[0]
        hows = {taken.axis: taken.how for use in uses for taken in use.taken}
        self.places.check(leaf, uses)
        reason = describe(ins, outs, stack, hows, uses[0].kind)
        if not outs:
            if any(hows.get(axis) in ("index", "scan", "loop") for axis in stack):
                self.places.check_chain(leaf, uses, "used row by row or column by column")
            return Verdict("vector", f"{reason}, nothing stays: vectors")
        if all(use.depthwise for use in uses):
            return Verdict("elementwise", "depthwise convolution")
        spec: MatrixSpec = MuonDimensionNumbers(ins, outs)
        groups = {use.groups for use in uses}
        if groups != {1}:
            spec = _grouped(shape, ins, outs, groups)
            reason += f", {max(groups)} feature groups"
        becomes = None
        if len(outs) == 1:
            label = self.labels[leaf][outs[0]].root
            hints += hints_of(label, outs[0], uses, self.attention)
            becomes = heads_of(label, self.attention)
        return Verdict("matrix", reason, spec, tuple(hints), heads, becomes)

    def _is_followed(self, use: Use) -> bool:
        return bool(self.reader.followers[use.product] & self.live)

    def _without_product(self, leaf: int, notes: dict[str, list[str]]) -> Verdict:
        if "vector" in notes:
            raise Doubt("product with a vector of parameters only")
        if "rows" in notes:
            return Verdict("embedding", "rows by index")
        if "elementwise" in notes:
            return Verdict("elementwise", "elementwise only")
        if leaf in self.reader.entered:
            raise Doubt("used, but in no product, and in no other way that by_use knows")
        raise Doubt("this loss does not use it")

    def question(self, leaf: int, doubt: Doubt) -> Question:
        """What to ask of a parameter in doubt, with what it were, were it just what was seen of it.

        AdamW's where it may be a table or the head; of several uses the first speaks.
        """
        why = str(doubt)
        uses = self.uses.get(leaf, [])
        if "rows" in why or (uses and not any(map(self._is_followed, uses))):
            return Question(why, "maybe a table, or the head", None)
        for use in uses[:1]:
            shape = self.reader.shapes[leaf]
            apart = {*use.batch} | {taken.axis for taken in use.taken}
            ins, outs = (
                tuple(axis for axis, size in enumerate(shape) if size > 1 and axis in axes - apart)
                for axes in ({*use.contracted}, use.free)
            )
            if ins and outs and not {*ins} & {*outs}:
                whole = MuonDimensionNumbers(ins, outs)
                if use.kind == "convolution" or len(ins) == len(outs) == 1:
                    return Question(why, "as it was used", whole)
                # Heads taken for a stack are each orthogonalized by itself; a stack of layers or
                # experts taken for heads would be one wrong matrix.
                kind = f"a stack, or of heads, and then MuonDimensionNumbers({ins}, {outs})"
                return Question(why, kind, MuonDimensionNumbers(ins[-1:], outs[-1:]))
        return Question(why)

    # --- Axes ------------------------------------------------------------------------------------

    def _axes(self, use: Use) -> tuple[Axes, Axes, Axes, Axes]:
        """Fan-in, fan-out, stack, and the head axes among the first two, of one use."""
        shape = self.reader.shapes[use.leaf]
        stacked = {*use.batch} | {taken.axis for taken in use.taken}
        long = [axis for axis, size in enumerate(shape) if size > 1]
        ins = [axis for axis in long if axis in use.contracted]
        outs = [axis for axis in long if axis in use.free]
        stack = [axis for axis in long if axis in stacked]
        for axis in long:
            roles = (axis in ins) + (axis in outs) + (axis in stack)
            if roles > 1:
                raise Doubt(
                    f"axis {axis} is used in tiles: {describe((*ins,), (*outs,), (*stack,))}"
                )
            if not roles:
                raise Doubt(f"axis {axis} takes part in no product")
        if not ins:
            raise Doubt("a product that sums over none of its axes")
        for axis in ins:
            if axis in use.partly:
                raise Doubt(f"contracted over pieces of axis {axis}")
        self._check_batch(use)
        if len(outs) == 1 and self._holds_experts(self.labels[use.leaf][outs[0]].root):
            raise Doubt(
                f"another parameter's product runs along pieces of axis {outs[0]}: maybe a stack "
                "stored side by side"
            )
        heads: tuple[int, ...] = ()
        if len(ins) > 1 and use.kind != "convolution":
            heads = self._joint_input(use, ins)
        if len(outs) > 1:
            experts = self._experts(use.leaf, outs)
            joint = self._heads(use.leaf, outs)
            if (experts is None) == (joint is None):
                raise Doubt(
                    f"its axes {outs} all stay, and nothing shows whether they are one output "
                    "(heads) or a stack"
                )
            if experts is not None:
                stack, outs = sorted([*stack, *experts]), [x for x in outs if x not in experts]
            else:
                heads = joint or ()
                self._check_heads(use.leaf, outs, heads)
        self._check_gates(use, ins)
        return (*ins,), (*outs,), (*stack,), heads

    def _check_heads(self, leaf: int, outs: list[int], heads: Axes) -> None:
        """Doubt heads that may be members of an ensemble, or relations that the batch brings."""
        for axis in heads:
            label = self.labels[leaf][axis].root
            if label.of_data:
                raise Doubt(f"axis {axis} runs along an axis of the batch: a stack, or heads?")
            if equations(label, "weight", "batch"):
                raise Doubt(
                    f"another parameter's product runs along axis {axis}: a stack, or heads?"
                )
        if len(heads) > 1 and outs[-1] - outs[0] >= len(outs):
            raise Doubt(f"attention runs along its axes {[*heads]}: heads, or a stack of them?")

    def _check_gates(self, use: Use, ins: list[int]) -> None:
        """Doubt a sum over what other parameters run along, or a softmax weighs: rows?"""
        for axis in ins if len(ins) == 1 and use.kind == "product" else []:
            labels = use.contracted[axis] or []
            for label in labels if len(labels) == 1 else ():
                gates = ("softmax",) in label.root.events and is_made(label)
                if gates or (is_made(label) and equations(label, "weight", "batch")):
                    raise Doubt(
                        f"its axis {axis} is summed over with weights, along which other products "
                        "run or a softmax was taken: rows of a table, or one for each expert?"
                    )

    def _check_batch(self, use: Use) -> None:
        for axis, labels in use.batch.items():
            for label in labels:
                events = label.root.events
                if ("free",) in events and any(
                    event[0] == "meeting" and event[3] == "batch" and event[1] in self.attention
                    for event in events
                ):
                    raise Doubt(f"axis {axis} runs along with attention's heads: a stack, or one?")

    def _experts(self, leaf: int, outs: list[int]) -> list[int] | None:
        """The axes along which another parameter's product runs while it sums over the others."""
        labels = {axis: self.labels[leaf][axis].root for axis in outs}
        batch = {axis: equations(label, "weight", "batch") for axis, label in labels.items()}
        summed = {axis: equations(label, "weight", "contracted") for axis, label in labels.items()}
        stack = [a for a in outs if any(batch[a] & summed[b] for b in outs if b != a)]
        # Experts are added up in the end, and members of an ensemble keep apart up to the loss.
        # Heads of a block-diagonal product stay, and are summed over with what they hold.
        stack = [
            axis
            for axis in stack
            if is_added_up(labels[axis]) or self.apart.holds(self.uses[leaf], labels[axis])
        ]
        rest = [axis for axis in outs if axis not in stack]
        if any({("outer",), ("joint",)} & labels[axis].events for axis in stack):
            return None
        if not stack or len(rest) != 1 or any(summed[a] & summed[rest[0]] for a in stack):
            return None
        return stack

    def _holds_experts(self, label: Label) -> bool:
        """Whether a product with a parameter runs along one factor, and sums over another."""
        for factors in label.factors:
            batch, summed = (
                [equations(factor.root, "weight", role) for factor in factors]
                for role in ("batch", "contracted")
            )
            for i, along in enumerate(batch):
                if any(along & over for j, over in enumerate(summed) if j != i):
                    return True
        return False

    def _heads(self, leaf: int, outs: list[int]) -> tuple[int, ...] | None:
        """The axes that run along a product of activations while it sums over, or keeps, another.

        None without such a product.
        """
        labels = [self.labels[leaf][axis] for axis in outs]
        for place, meeting in self.attention.items():
            for side in (0, 1):
                roles = [roles_in(label, place, side) for label in labels]
                if not all(roles):
                    continue
                positions = [
                    x for x in meeting.free[side] if x.of_data and not x.is_piece_of(labels)
                ]
                across = any(x.of_data for x in meeting.free[1 - side])
                summed = [i for i, role in enumerate(roles) if "contracted" in role]
                along = [i for i, role in enumerate(roles) if "batch" in role]
                if len(summed) == 1 and positions and across:
                    return tuple(axis for i, axis in enumerate(outs) if i not in summed)
                of_values = all(x.of_data for x in meeting.contracted) and not any(
                    x.is_piece_of(labels) for x in meeting.contracted
                )
                if not summed and along and len(along) < len(outs) and of_values and across:
                    return tuple(outs[i] for i in along)
        return None

    def _joint_input(self, use: Use, ins: list[int]) -> tuple[int, ...]:
        """The head axes among several that a product sums over, which must be one input."""
        known = [use.contracted[axis] for axis in ins]
        if all(labels for labels in known):
            if all(x.of_data and not is_made(x) for labels in known for x in labels or []):
                return ()
            for place, meeting in self.attention.items():
                roles = [
                    {role for x in labels or [] for role in roles_in(x, place)} for labels in known
                ]
                made = [x for labels in known for x in labels or []]
                values = all(x.of_data for x in meeting.contracted)
                queries = any(
                    x.of_data and not x.is_piece_of(made) for free in meeting.free for x in free
                )
                if values and queries and all(role & {"batch", "free"} for role in roles):
                    return self._many(ins, known, place, meeting)
        raise Doubt(
            f"contracted over its axes {ins} at once, and nothing shows whether they are one input "
            "(heads) or a stack"
        )

    def _many(
        self, ins: list[int], known: list[list[Label] | None], place: Any, meeting: Meeting
    ) -> tuple[int, ...]:
        """The axes of heads: all but the one that the values alone bring."""
        for side in (0, 1):
            if any(x.of_data for x in meeting.free[side]):
                continue
            width = [
                axis
                for axis, labels in zip(ins, known, strict=True)
                if all("free" in roles_in(x, place, side) for x in labels or [])
            ]
            if len(width) == 1:
                return tuple(axis for axis in ins if axis not in width)
        return ()


def _grouped(
    shape: tuple[int, ...], ins: tuple[int, ...], outs: tuple[int, ...], groups: set[int]
) -> FusedBlocks:
    """A convolution of several groups: each is a matrix of its own, along the output axis."""
    count, axis = max(groups), max(outs)
    if len(groups) > 1 or len(outs) > 1 or shape[axis] % count:
        raise Doubt(f"a convolution of {sorted(groups)} feature groups whose outputs are not plain")
    return FusedBlocks((shape[axis] // count,) * count, axis, MuonDimensionNumbers(ins, outs))
