"""Axes whose places keep apart up to the loss, as the members of a vmapped ensemble do."""

from muon_jax._routing.use.events import equations
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.reader import Reader, Use, bits


class Apart:
    """What comes behind the products of a program.

    Args:
      reader: the reader of the program, which it has read.
      live: the products whose outcome reaches the loss, as bits.
    """

    def __init__(self, reader: Reader, live: int):
        self._reader = reader
        self._live = live
        self._equations = {use.product: at for at, uses in reader.uses.items() for use in uses}
        # Attention, a primitive without a rule and a frozen matrix may sum over an axis unseen.
        self._mixing = 0
        for meeting in reader.meetings.values():
            self._mixing |= meeting.pending
        for pending in reader.closed.values():
            self._mixing |= pending

    def holds(self, uses: list[Use], label: Label) -> bool:
        """Whether all products behind a parameter's uses run along one of its axes.

        Then no product ever sums over the axis, and what lies along it is no input of anything.
        """
        if label.of_data or {event[0] for event in label.events} & {"meeting", "softmax"}:
            return False
        behind, todo = 0, [use.product for use in uses]
        own = sum(1 << number for number in {*todo})
        while todo:
            new = self._reader.followers[todo.pop()] & self._live & ~behind
            behind |= new
            todo += bits(new)
        if self._mixing & (own | behind):
            return False
        along = equations(label, "weight", "batch")
        return all(self._equations.get(number) in along for number in bits(behind))
