"""A disk of a few megabytes, and a folder that cannot be written: Linux and root can make both."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Callable[[str], None]]:
    """Mounts a disk of a few megabytes; yields what changes its options."""
    folder.mkdir(parents=True)

    def mount(options: str) -> None:
        _mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))

    mount(f"size={megabytes}m")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def bind_read_only(folder: Path) -> None:
    """Mounts a folder over itself, so that nothing in it can be changed, until `unmount`."""
    _mount("--bind", str(folder), str(folder))
    _mount("-o", "remount,bind,ro", str(folder))


def unmount(folder: Path) -> None:
    """Takes such a mount away."""
    subprocess.run(["umount", str(folder)], check=True)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)
