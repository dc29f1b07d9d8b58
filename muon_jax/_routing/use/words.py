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
    verb = "window and input" if kind == "convolution" else "contracted over"
    noun = "axis" if len(ins) == 1 else "axes"
    words = [f"{verb} {noun} {', '.join(map(str, ins))}"]
    if outs:
        words.append(f"out {', '.join(map(str, outs))}")
    for axis in stack:
        how = (hows or {}).get(axis)
        words.append(f"stack {axis} ({_HOWS[how] if how else 'batch'})")
    return ", ".join(words)
