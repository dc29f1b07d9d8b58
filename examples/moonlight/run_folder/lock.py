"""One process at a time works in a run's folder, and notices when the folder is no longer its own.

Two things guard a folder for a run's life. A lock of the operating system (`flock`, by `filelock`)
keeps a second process out, and ends with its process, however that dies. It holds between all
processes of one machine, and between machines where the file system carries it: NFS from Linux
2.6.12 on (as a lock of bytes; not with the mount options `nolock` or `local_lock=flock`), Lustre
mounted with `flock`, GPFS, CephFS. Where a file system has no `flock` at all, filelock takes a
lock file in its place, which a killed process leaves behind: it says so, and names the file.

For file systems that grant the lock to two machines without a word there is a second guard: each
process writes its own mark into the folder when it enters, and looks for it before whatever it
saves. Who finds another's mark, or none, stops and writes nothing more. So of two processes that
were let in the one that came last goes on, and the other ends at its next save. In an object store,
which has no locks, the mark is the only guard.

Of the processes of one run the first holds the folder, for all.
"""

import json
import os
import platform
import time
import uuid
from pathlib import Path
from types import TracebackType

import filelock

from examples.moonlight.common.files import write_atomically
from examples.moonlight.run_folder.flags import PRETRAINING, Flags
from examples.moonlight.run_folder.storage import Folder

# Hidden, as is all that is no result of a run.
LOCK, MARK = ".lock", ".owner.json"


class FolderInUse(RuntimeError):
    """Another process works in the folder."""


class FolderLost(RuntimeError):
    """The folder that a process worked in was deleted, or taken over by another."""


class Mark:
    """A process's mark in a folder: whoever came last has his there.

    Args:
        folder: It exists.
    """

    def __init__(self, folder: Folder):
        self._folder, self._mark = folder, uuid.uuid4().hex

    def write(self) -> None:
        """Takes the folder over."""
        owner = {
            "mark": self._mark,
            "host": platform.node(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        text = json.dumps(owner).encode()
        if isinstance(self._folder, Path):
            write_atomically(self._folder / MARK, text)
        else:
            (self._folder / MARK).write_bytes(text)

    def check(self) -> None:
        """Makes sure that the folder is still this process's own.

        Raises:
            FolderLost: It is not.
        """
        owner = _read(self._folder)
        if owner.get("mark") == self._mark:
            return
        if owner:
            what = f"was taken over by {_described(owner)}"
        elif self._folder.exists():
            what = "was used by another process, or made anew,"
        else:
            what = "was deleted or moved"
        raise FolderLost(
            f"{self._folder} {what} while this process worked in it: it stops here, and saves "
            "nothing more"
        )

    def remove(self) -> None:
        """Takes the mark away, unless it is another's."""
        if _read(self._folder).get("mark") == self._mark:
            (self._folder / MARK).unlink(missing_ok=True)


class RunLock:
    """Holds a folder that exists, from entering the context to leaving it.

    Args:
        folder: The run's folder.
        flags: What the program calls its flags.

    Raises:
        FolderInUse: On entering: another process holds it. Nothing was changed.
    """

    def __init__(self, folder: Path, flags: Flags = PRETRAINING):
        self._folder, self._flags = folder, flags
        self._mark = Mark(folder)
        self._lock = filelock.FileLock(folder / LOCK, thread_local=False)
        self._entered = False

    def __enter__(self) -> "RunLock":
        try:
            self._lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise FolderInUse(
                f"{self._folder} is in use by {_described(_read(self._folder))}: wait until that "
                f"run ends, stop it, or choose another {self._flags.output}; nothing was changed. "
                f"(Locked by {self._folder / LOCK})"
            ) from error
        try:
            self._mark.write()
        except BaseException:
            self._lock.release()
            raise
        self._entered = True
        return self

    def check(self) -> None:
        """Makes sure that the folder is still this process's own; where another holds it, nothing.

        Raises:
            FolderLost: It is not.
        """
        if self._entered:
            self._mark.check()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._mark.remove()
        self._lock.release()


def _read(folder: Folder) -> dict[str, object]:
    """What the mark of a folder says; nothing where there is none."""
    try:
        owner = json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _described(owner: dict[str, object]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('process')} on {owner.get('host')}, since {owner.get('since')}"
