"""What was seen of a parameter's axes, in words."""

_HOWS = {
    "scan": "scan",
    "index": "place by place",
    "loop": "loop",
    "rows": "chosen by index",
}


def describe(
    ins: tuple[int, ...],
    outs: tuple[int, ...],
    stack: tuple[int, ...],
    hows: dict[int, str] | None = None,
    kind: str = "product",
) -> str:
    """What was seen of the axes, in words."""

    def some(axes: tuple[int, ...]) -> str:
        word = "axis" if len(axes) == 1 else "axes"
        return f"{word} {', '.join(map(str, axes))}"

    words = [f"{'window and input' if kind == 'convolution' else 'contracted over'} {some(ins)}"]
    if outs:
        words.append(f"out {', '.join(map(str, outs))}")
    for axis in stack:
        how = (hows or {}).get(axis)
        words.append(f"stack {axis} ({_HOWS[how] if how else 'batch'})")
    return ", ".join(words)
