"""What the events say that an axis went through."""

from typing import Any

from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.reader import Meeting


def is_attention(meeting: Meeting) -> bool:
    """Whether positions meet positions, or are summed over."""
    if meeting.contracted and all(label.of_data for label in meeting.contracted):
        return True
    return all(any(label.of_data for label in side) for side in meeting.free)


def equations(label: Label, kind: str, role: str) -> set[Any]:
    """The equations that an axis took part in with others of a kind, in a role."""
    return {event[1] for event in label.root.events if event[0] == kind and event[-1] == role}


def roles_in(label: Label, place: Any, side: int | None = None) -> set[str]:
    """What an axis was in a product of activations, on one side of it or on both."""
    return {
        event[3]
        for event in label.root.events
        if event[0] == "meeting" and event[1] == place and side in (None, event[2])
    }


def is_added_up(label: Label) -> bool:
    """Whether an axis is summed over in the end, by itself."""
    events = label.root.events
    return any(
        event[0] == "added"
        or (
            event[0] == "meeting"
            and event[3] == "contracted"
            and ("joint meeting", event[1]) not in events
        )
        for event in events
    )


def is_made(label: Label) -> bool:
    """Whether an axis is, somewhere, one that a parameter made."""
    return ("free",) in label.root.events
