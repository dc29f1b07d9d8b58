"""Which axes of activations are one and the same, and what happened to them.

A `Label` names an axis. Two axes that meet in a sum, or as batch axes of a product, are one axis:
their labels unite. Pieces of an axis have labels of their own, of which the axis hears everything.
"""

from collections.abc import Iterable, Sequence


class Label:
    """The name of an axis of activations, or of one of its factors or slices.

    Attributes:
      size: its length.
      events: what happened to the axis or to a piece of it.
    """

    __slots__ = ("_data", "_parent", "_sources", "_splits", "_takes", "events", "size")

    def __init__(self, size: int, sources: Iterable["Label"] = (), data: bool = False):
        self.size = size
        self.events: set[tuple] = set()
        self._parent: Label | None = None
        self._sources: list[Label] = list(sources)
        self._splits: dict[tuple[int, ...], tuple[Label, ...]] = {}
        self._takes: dict[tuple[int, int, int], Label] = {}
        self._data = data

    @property
    def root(self) -> "Label":
        """The label that stands for all that are united with this one."""
        label = self
        while label._parent is not None:
            label = label._parent
        return label

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Label) and self.root is other.root

    def __hash__(self) -> int:
        return id(self.root)

    def split(self, sizes: Sequence[int]) -> tuple["Label", ...]:
        """Its factors, major first; the same labels each time."""
        kept = self.root
        key = tuple(sizes)
        if key not in kept._splits:
            kept._splits[key] = tuple(Label(size, [kept]) for size in key)
        return kept._splits[key]

    def take(self, start: int, size: int, step: int = 1) -> "Label":
        """Every `step`-th of the entries from `start`; the same label each time."""
        kept = self.root
        if (start, size, step) == (0, kept.size, 1):
            return kept
        key = (start, size, step)
        if key not in kept._takes:
            kept._takes[key] = Label(size, [kept])
        return kept._takes[key]

    @property
    def parents(self) -> list["Label"]:
        """The labels that hear what happens to this one."""
        return [label.root for label in self.root._sources]

    def has_piece(self, start: int, piece: "Label") -> bool:
        """Whether the slice from `start` is `piece`."""
        taken = self.root._takes.get((start, piece.size, 1))
        return taken is not None and taken == piece

    def name_piece(self, start: int, piece: "Label") -> None:
        """Say that a slice of this axis is `piece`, which hears what happens to the whole."""
        kept = self.root
        kept._takes[start, piece.size, 1] = piece
        kept._sources.append(piece)

    @property
    def slices(self) -> list[tuple[int, int]]:
        """Start and size of the slices without gaps that were taken of it."""
        return sorted((start, size) for start, size, step in self.root._takes if step == 1)

    @property
    def factors(self) -> list[tuple["Label", ...]]:
        """Its factors, in each way that it was split."""
        return [*self.root._splits.values()]

    def is_piece_of(self, others: Iterable["Label"]) -> bool:
        """Whether it is one of `others`, or a piece of one."""
        wanted, seen, todo = {id(x.root) for x in others}, set(), [self.root]
        while todo:
            label = todo.pop().root
            if id(label) in wanted:
                return True
            if id(label) not in seen:
                seen.add(id(label))
                todo.extend(label._sources)
        return False

    def add(self, event: tuple) -> None:
        """Note what happened to the axis, for itself and all that it is a piece of."""
        todo = [self.root]
        while todo:
            label = todo.pop().root
            if event not in label.events:
                label.events.add(event)
                todo.extend(label._sources)

    @property
    def of_data(self) -> bool:
        """Whether it is an axis of the batch, or a piece of one."""
        seen, todo = set(), [self.root]
        while todo:
            label = todo.pop().root
            if id(label) in seen:
                continue
            seen.add(id(label))
            if label._data:
                return True
            todo.extend(label._sources)
        return False

    @property
    def is_made(self) -> bool:
        """Whether a parameter made it, or the axis that it is a piece of."""
        seen, todo = set(), [self.root]
        while todo:
            label = todo.pop().root
            if ("free",) in label.events:
                return True
            if id(label) not in seen:
                seen.add(id(label))
                todo.extend(label._sources)
        return False

    @staticmethod
    def join(labels: Iterable["Label"], event: tuple) -> None:
        """Note an event of the axes that parameters made, where several of them share it."""
        made = [label for label in labels if label.is_made]
        if len({id(label.root) for label in made}) > 1:
            for label in made:
                label.add(event)

    def unite(self, other: "Label") -> None:
        """Make two labels one, with their pieces."""
        todo = [(self, other)]
        while todo:
            a, b = (label.root for label in todo.pop())
            if a is b:
                continue
            b._parent = a
            a._data |= b._data
            a._sources += b._sources
            events = a.events | b.events
            # One by one where others hear of them; a residual stream's grow with the depth.
            a.events = set() if a._sources else events
            for event in events if a._sources else ():
                a.add(event)
            for mine, others in ((a._splits, b._splits), (a._takes, b._takes)):
                for key, pieces in others.items():
                    if key not in mine:
                        mine[key] = pieces  # type: ignore[index]
                    elif isinstance(pieces, Label):
                        todo.append((mine[key], pieces))  # type: ignore[arg-type]
                    else:
                        todo.extend(zip(mine[key], pieces, strict=True))  # type: ignore[arg-type]
