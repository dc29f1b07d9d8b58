"""Orbax, as the checkpoints use it: three items, written while the training goes on.

`save` returns once the arrays are in the host's memory, where no later step can reach them, and the
files are written behind it, by each process its own shards. On an accelerator Orbax' transfer to
the host is that copy. On a CPU there is none: its arrays lie in the host's memory already, and what
Orbax would write is a view of a buffer that was donated to the next step; that jaxlib makes no use
of such a buffer while it is viewed is observed, and nowhere promised. They are copied before.
"""

import contextlib
import gc
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from examples.moonlight.run_folder.storage import Folder, absolute

PyTree = Any

MODEL, OPTIMIZER, PROGRESS = "model", "optimizer", "progress"

# Seconds after which a process that waits for others to have written their shards gives up.
PATIENCE = 1200

# Bytes of a piece of an array in the files: who restores onto another mesh reads whole pieces.
_PIECE = 1 << 26

# Seconds that the threads of a failed save get to end, and after that those of Orbax' engine, which
# are none of Python's and cannot be waited for.
_TO_END, _REST = 10.0, 0.5


def make_checkpointer() -> ocp.AsyncCheckpointer:
    """Orbax, for the three items of a checkpoint."""
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            **{
                MODEL: ocp.StandardCheckpointHandler(),
                OPTIMIZER: ocp.StandardCheckpointHandler(),
                PROGRESS: ocp.JsonCheckpointHandler(),
            }
        ),
        timeout_secs=PATIENCE,
    )


def save_args(model: PyTree, optimizer: PyTree, progress: Mapping[str, Any]) -> Any:
    """What Orbax saves as a checkpoint."""
    return ocp.args.Composite(
        model=_save_arrays(model),
        optimizer=_save_arrays(optimizer),
        progress=ocp.args.JsonSave(dict(progress)),
    )


def _save_arrays(tree: PyTree) -> Any:
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), tree)
    return ocp.args.StandardSave(tree, save_args=pieces)


def restore_args(model: PyTree, optimizer: PyTree) -> Any:
    """What Orbax restores of one, into the structure, dtypes and shardings of the arguments."""
    return ocp.args.Composite(
        model=restore_arrays(model),
        optimizer=restore_arrays(optimizer),
        progress=ocp.args.JsonRestore(),
    )


def restore_arrays(target: PyTree) -> Any:
    """What Orbax restores as an item of arrays: each process its own shards."""
    return ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, target))


def restore_item(folder: Folder, name: str, item: Any) -> Any:
    """Reads one item of a checkpoint."""
    with make_checkpointer() as orbax:
        return orbax.restore(absolute(folder), args=ocp.args.Composite(**{name: item}))[name]


def out_of_reach(tree: PyTree) -> PyTree:
    """Arrays whose memory no donation of these can touch while they are saved; see above."""
    if jax.default_backend() != "cpu":
        return tree
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tree)


@contextlib.contextmanager
def one_error() -> Iterator[None]:
    """Lets Orbax raise one error where a save fails, in the place of pages that it logs.

    Its threads go on after the first of them has failed, fail too, and write their tracebacks, some
    as late as the interpreter's end, where they would hide the cause. Its engine's answers come to
    an event loop that is closed.
    """
    unraisable = sys.unraisablehook

    def tell(event: Any) -> None:
        if "Event loop is closed" not in str(event.exc_value):
            unraisable(event)

    sys.unraisablehook = tell
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.disabled for logger in loggers]
    others = {*threading.enumerate()}
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    except Exception:
        deadline = time.monotonic() + _TO_END
        for thread in {*threading.enumerate()} - others - {threading.current_thread()}:
            # Those of a pool never end, and hold nothing back.
            if not thread.name.startswith(("ThreadPoolExecutor", "asyncio_", "metadata_store")):
                thread.join(max(0.0, deadline - time.monotonic()))
        gc.collect()  # of tasks whose errors nobody fetched, which say so as they go
        time.sleep(_REST)
        raise
    finally:
        sys.unraisablehook = unraisable
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was


def cause(error: BaseException) -> str:
    """What the system says, or the first line of a long error."""
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(found[1]))
    return next(iter(str(error).splitlines()), "") or type(error).__name__
