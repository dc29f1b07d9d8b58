"""The header of a safetensors file, read for what the format's own reader lets pass.

    8 bytes      length N of the header, little-endian
    N bytes      {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the rest     the tensors' bytes

The reader checks that the tensors fill the rest, without gaps and overlaps. Of two tensors with one
name, it takes the last and says nothing.
"""

from pathlib import Path
from typing import Any

from examples.moonlight.common.json_text import check_plain, parse_json
from examples.moonlight.common.untrusted import check_file, shown, shown_name

# Of a header, in bytes: the format's own limit. That of a published shard has some 100 kB.
MAX_HEADER = 100_000_000

METADATA = "__metadata__"


def check_header(path: Path) -> None:
    """Checks a file's header.

    Raises:
        FileNotFoundError: There is no file.
        ValueError: It is no regular file, is cut off, or has a header that is no JSON object of
            tensors, or two tensors of one name.
    """
    size = check_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise _damaged(path, f"it has {size:,} bytes, and its header {length:,}")
        content = file.read(length)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _damaged(path, f"byte {8 + error.start} of its header is not UTF-8") from error
    if not text.startswith("{"):
        raise _damaged(path, "its header is no JSON object")
    header = parse_json(text, path)
    check_plain(header, path)
    for name, entry in header.items():
        if name != METADATA and not _is_tensor(entry):
            raise _damaged(path, f"its header says of {shown_name(name)}: {shown(entry)}")


def _is_tensor(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and _are_sizes(entry.get("shape"))
        and _are_sizes(entry.get("data_offsets"))
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{shown_name(path)} is damaged or no safetensors file ({what}): fetch or export it again"
    )
