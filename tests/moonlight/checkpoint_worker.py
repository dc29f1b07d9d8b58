"""One of two processes that write and read the same checkpoints; see test_checkpoint_processes.py.

python -m tests.moonlight.checkpoint_worker ADDRESS NUMBER FOLDER SCENE
"""

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from examples.moonlight.run_folder import seal, storage
from examples.moonlight.run_folder.checkpoint import Checkpoints
from examples.moonlight.run_folder.folder import open_run_folder
from examples.moonlight.run_folder.retention import Retention

PROCESSES, DEVICES = 2, 2  # devices of each process
ROWS, COLUMNS = 512, 1024


def values(step: int) -> dict[str, np.ndarray]:
    """What a checkpoint of a step holds: no pattern, which would take less room than weights."""
    draw = np.random.default_rng(step)
    return {
        "sharded": draw.standard_normal((ROWS, COLUMNS), np.float32),
        "both": draw.standard_normal((64, 96), np.float32),
        "whole": draw.standard_normal(40, np.float32),
    }


SPECS = {"sharded": P(("a", "b")), "both": P("b", "a"), "whole": P()}


def placed(step: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The same on a mesh."""

    def place(x: np.ndarray, spec: P) -> jax.Array:
        return jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, spec), lambda index: x[index]
        )

    return {name: place(x, SPECS[name]) for name, x in values(step).items()}


def make_mesh(shape: tuple[int, int]) -> Mesh:
    return jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))


@contextlib.contextmanager
def opened(folder: Path, latest: int = 2):
    said = io.StringIO()
    console = Console(file=said, width=1000)
    with contextlib.closing(Checkpoints(folder, Retention(latest), console)) as checkpoints:
        yield checkpoints, said


def save(checkpoints: Checkpoints, step: int, mesh: Mesh, loss: float) -> None:
    tree = placed(step, mesh)
    checkpoints.save(step, model=tree, optimizer=tree, progress={"at": step}, val_loss=loss)


def assert_holds(tree: Any, step: int) -> None:
    """Compares this process's shards."""
    expected = values(step)
    for name, x in tree.items():
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[name][shard.index])


def bytes_read() -> int:
    """Bytes that TensorStore, through which Orbax restores, has read from files."""
    name = "/tensorstore/kvstore/file/bytes_read"
    return sum(
        value["value"]
        for metric in tensorstore.experimental_collect_matching_metrics(name)
        for value in metric["values"]
    )


def whole_life(folder: Path) -> dict[str, Any]:
    """Restores what one process wrote; saves, trains on, loses and finds, as two do."""
    found: dict[str, Any] = {}
    mesh = make_mesh((2, 2))

    # What another mesh of one process has written.
    with opened(folder / "of_one") as (checkpoints, _):
        before = bytes_read()
        restored = checkpoints.restore(model=placed(0, mesh), optimizer=placed(0, mesh))
        found["read"] = bytes_read() - before
        assert (restored.step, restored.progress) == (8, {"at": 8})
        assert_holds(restored.model, 8)

    digested: list[str] = []
    digest = seal._digest

    def record(path: Path) -> list[Any]:
        digested.append(path.relative_to(folder / "of_two").as_posix())
        return digest(path)

    # The steps behind a save overwrite what it saves.
    train = jax.jit(lambda tree: jax.tree.map(lambda x: -2 * x, tree), donate_argnums=0)
    seal._digest = record
    with opened(folder / "of_two") as (checkpoints, said):
        for step, loss in {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}.items():
            model, optimizer = placed(step, mesh), placed(step, mesh)
            checkpoints.save(
                step, model=model, optimizer=optimizer, progress={"at": step}, val_loss=loss
            )
            for _ in range(3):
                model, optimizer = train(model), train(optimizer)
            jax.block_until_ready((model, optimizer))
        # The best, and the last two.
        assert checkpoints.all_steps() == storage.kept_steps(checkpoints.directory) == [2, 3, 4]
        seal._digest = digest
        found["digested"] = digested

        # One bit of what the second process has written: whoever's share it is, both go back.
        if jax.process_index() == 1:
            path = max((folder / "of_two/4/model/ocdbt.process_1/d").iterdir(), key=storage.size)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        multihost_utils.sync_global_devices("damaged")
        restored = checkpoints.restore(model=placed(0, mesh), optimizer=placed(0, mesh))
        assert restored.step == 3
        assert_holds(restored.model, 3)
        assert_holds(restored.optimizer, 3)
        assert checkpoints.delete_after(2) == [3]
        assert checkpoints.all_steps() == [2]
        found["said"] = said.getvalue()

    # A file that the first process alone can read is not damaged.
    with opened(folder / "of_two") as (checkpoints, _):
        check = seal.check
        if jax.process_index() == 1:

            def fail(*_: Any, **__: Any) -> None:
                raise seal.Damaged("x is missing")

            seal.check = fail
        found["hidden"] = error_of(
            lambda: checkpoints.restore(model=placed(0, mesh), optimizer=placed(0, mesh))
        )
        seal.check = check
        assert checkpoints.all_steps() == [2]

    # Folders of which each process sees another one.
    storage._SHOWN = 0.3
    found["apart"] = error_of(
        lambda: Checkpoints(folder / f"own-{jax.process_index()}", Retention(1))
    )

    def enter(settings: dict[str, Any]) -> str:
        with open_run_folder(folder / "run", settings, resume=False) as lock:
            lock.check()
            return "entered"

    found["settings"] = error_of(lambda: enter({"steps": jax.process_index(), "a": 1}))
    found["run"] = enter({"steps": 1})
    found["again"] = error_of(lambda: enter({"steps": 1}))
    return found


def error_of(function: Any) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def one_fails(folder: Path) -> dict[str, Any]:
    """The second process cannot read what it wrote; then it is killed while it does."""
    mesh = make_mesh((4, 1))
    digest = seal._digest
    with opened(folder / "of_two") as (checkpoints, _):
        save(checkpoints, 5, mesh, 2.0)
        checkpoints.wait()

        def fail(path: Path) -> list[Any]:
            raise OSError(5, "Input/output error")

        if jax.process_index() == 1:
            seal._digest = fail
        save(checkpoints, 6, mesh, 2.0)
        failed = error_of(checkpoints.wait)
        (folder / f"failed-{jax.process_index()}.json").write_text(
            json.dumps([failed, checkpoints.all_steps(), storage.kept_steps(folder / "of_two")])
        )
        multihost_utils.sync_global_devices("failed")
        seal._digest = digest

        def die(path: Path) -> list[Any]:
            os.kill(os.getpid(), signal.SIGKILL)
            return digest(path)

        if jax.process_index() == 1:
            seal._digest = die
        save(checkpoints, 7, mesh, 0.5)
        checkpoints.wait()
    return {}


def main() -> None:
    address, number, folder, scene = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address, PROCESSES, int(number), heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10
    )
    assert jax.device_count() == PROCESSES * DEVICES, jax.devices()
    found = {"whole_life": whole_life, "one_fails": one_fails}[scene](Path(folder))
    (Path(folder) / f"{number}.json").write_text(json.dumps(found))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
