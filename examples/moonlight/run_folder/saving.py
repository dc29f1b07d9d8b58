"""What follows a save behind the training's back: digests, the seal, and the checkpoint's name.

One process reads the files again, seals them and gives them their name. Of several, each digests
the files that it wrote, and puts the digests beside them; when all have, the first process seals
the whole without having read it, and names it; then all know that it is there. They meet at
barriers of the coordination service, not of the devices, which are training meanwhile.
"""

import itertools
import json
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp

from examples.moonlight.common.processes import group
from examples.moonlight.run_folder import seal, storage
from examples.moonlight.run_folder.engine import PATIENCE
from examples.moonlight.run_folder.seal import Digests
from examples.moonlight.run_folder.storage import Folder

# Where each process puts its digests until they are in the seal.
_DIGESTS = "digests"

# Orbax names what a process has written after it.
_WRITER = re.compile(r"process_(\d+)")

# Barriers have a name for each meeting; saves come in the same order in all processes.
_meetings = itertools.count()


class Behind(threading.Thread):
    """Work behind the training's back, of which `wait` raises the error.

    Args:
        work: Begun at once.
    """

    def __init__(self, work: Callable[[], None]):
        super().__init__(name="checkpoint")
        self._work = work
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Works; see `threading.Thread`."""
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Waits for its end, and raises its error, the first time."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


def seal_and_publish(
    draft: Folder,
    final: Folder,
    facts: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    may_publish: Callable[[], None],
) -> None:
    """Seals what all processes have written into a folder, and gives it its name.

    Args:
        draft: Where it lies; its files are complete.
        final: The folder's name.
        facts: What the seal says besides.
        files: What the first process adds, by their names.
        may_publish: Raises in the first process where the folder is another's meanwhile.

    Raises:
        OSError: A file cannot be read or written.
        RuntimeError: Another process failed, or the processes don't see the same folder.
    """
    if group.count() == 1:
        _add(draft, files)
        may_publish()  # the seal alone publishes in an object store
        seal.seal(draft, facts)
        storage.publish(draft, final)
        return
    meet = _meeting()
    failure = _leave_digests(draft, files if group.is_first() else {})
    meet("digests")
    try:
        if failure is not None:
            raise failure
        if group.is_first():
            digests = _collect_digests(draft)
            storage.remove(draft / _DIGESTS)
            may_publish()
            seal.seal(draft, facts, digests)
            storage.publish(draft, final)
    finally:
        meet("published")
    if not storage.is_shown(lambda: storage.is_whole(final)):
        raise RuntimeError(f"process 0 did not finish {final}")


def _meeting() -> Callable[[str], None]:
    number, barrier = next(_meetings), ocp.multihost.get_barrier_sync_fn()
    return lambda what: barrier(
        key=f"checkpoint/{number}/{what}", timeout_ms=round(1000 * PATIENCE)
    )


def _add(draft: Folder, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (draft / name).write_bytes(content)


def _leave_digests(draft: Folder, files: Mapping[str, bytes]) -> Exception | None:
    """Digests what this process wrote, for the first to find; or says what hindered it."""
    mine, count = group.index(), group.count()

    def wanted(name: str) -> bool:
        writer = _WRITER.search(name)
        return name != _DIGESTS and (0 if writer is None else int(writer[1]) % count) == mine

    # What is written by several lies in folders that are no one's: they are entered by all.
    def entered(name: str) -> bool:
        return wanted(name) or (
            name != _DIGESTS and _WRITER.search(name) is None and (draft / name).is_dir()
        )

    failure, left = None, {}
    try:
        _add(draft, files)
        left = {"files": seal.digest(draft, entered)}
    except Exception as error:
        failure, left = error, {"failed": str(error) or type(error).__name__}
    try:
        path = draft / _DIGESTS / f"{mine}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(json.dumps(left).encode())
        storage.sync(path)
    except OSError as error:
        failure = failure or error
    return failure


def _collect_digests(draft: Folder) -> Digests:
    digests: Digests = {}
    for process in range(group.count()):
        path = draft / _DIGESTS / f"{process}.json"
        if not storage.is_shown(path.exists):
            raise RuntimeError(
                f"process 0 does not see what process {process} wrote into {draft}: the "
                "checkpoints have to lie where all hosts see the same folder"
            )
        left = json.loads(path.read_bytes())
        if "failed" in left:
            raise RuntimeError(f"process {process}: {left['failed']}")
        digests |= left["files"]
    return digests
