"""The way into a group of processes, before any other call of JAX.

    enter(args.processes)

JAX waits in some places for as long as nobody says that it need not: how long is set here.
"""

import atexit
import os
import secrets
import sys
from typing import Any

import jax
import rich

# See `group`: besides, where process 0 is, when a cluster says so.
from jax._src import distributed
from rich.console import Console

from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.agreement import gather
from examples.moonlight.common.processes.args import ProcessArgs
from examples.moonlight.common.processes.cluster import check_package, find_cluster
from examples.moonlight.common.processes.launcher import VARIABLE, launch
from examples.moonlight.common.processes.watch import Watch, watch_launcher
from examples.moonlight.common.terminal import keep_stdout_from_libraries
from examples.xla_flags import known_flags

# Seconds without a sign of life after which JAX gives a process up that is stopped, or cut off: the
# connections of `watch` show most ends long before. And those that one waits at the end for the
# others: they meet before, so it is about as long as a process takes to end.
HEARTBEAT, SHUTDOWN = 20, 60

# Seconds that a collective on CPU waits for a process that is alive and takes no part. Between two
# of them, process 0 may write a large checkpoint, and one may read slower than another.
COLLECTIVE = 120
_COLLECTIVE_FLAG = "--xla_cpu_collective_timeout_seconds"

# Seconds for all to start.
_START = 600

_watch: Watch | None = None


def enter(args: ProcessArgs, *, reads: bool = False, console: Console | None = None) -> None:
    """Makes this process one of those that the flags, a launcher or a cluster name; or of one.

    `--local-processes` starts the others, and this process ends with them.

    Args:
        args: The flags.
        reads: Whether process 0 reads what is typed in the terminal.
        console: Where process 0 says who works together; None is rich's.

    Raises:
        ValueError: The flags do not go together.
        RuntimeError: The others cannot be found.
        SystemExit: All that were started here have ended.
    """
    args.check()
    local = os.environ.pop(VARIABLE, None)
    if local is not None:
        address, processes, process, handle = local.split(",")
        watch_launcher(int(handle))
        _initialize(address, int(processes), int(process), [int(process)], quiet=True)
        _introduce("this machine", console)
    elif args.local_processes is not None:
        if args.local_processes > 1:
            flags = os.environ.get("XLA_FLAGS", "")
            sys.stdout.flush()
            code = launch(args.local_processes, {"XLA_FLAGS": _with_timeout(flags)}, reads=reads)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code) if code else sys.exit(0)
    elif args.processes != 1:
        _enter_cluster(args, console)


def _enter_cluster(args: ProcessArgs, console: Console | None) -> None:
    cluster = find_cluster(os.environ)
    if args.coordinator is not None:
        processes = args.processes or (cluster and cluster.processes)
        process = args.process if args.process is not None else (cluster and cluster.process)
        if processes is None or process is None:
            raise ValueError(
                f"--coordinator {args.coordinator} needs --processes N, how many there are, and "
                "--process I, which of them this one is: no cluster says so here"
            )
        _initialize(args.coordinator, processes, process)
        _introduce(args.coordinator, console)
        return
    if args.processes is not None or args.process is not None:
        raise ValueError(
            "--processes and --process need --coordinator HOST:PORT, where process 0 listens"
        )
    if cluster is None:
        return
    check_package(cluster)
    try:
        _initialize(None, cluster.processes, cluster.process, method=cluster.method)
    except OSError as error:  # of a metadata server: a TPU elsewhere than at Google has none
        if cluster.method != "gcetpu":
            raise
        told = f"one process: {cluster.name} does not answer ({error})"
        (console or rich.get_console()).print(told, soft_wrap=True)
        return
    _introduce(cluster.name, console)


def _initialize(
    address: str | None,
    processes: int | None,
    process: int | None,
    devices: list[int] | None = None,
    *,
    method: str | None = "deactivate",
    quiet: bool = False,
) -> None:
    """Meets the others, and watches them from then on."""
    os.environ["XLA_FLAGS"] = _with_timeout(os.environ.get("XLA_FLAGS", ""))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would swallow SIGTERM, which `StopRequest` tells the others.
    jax.config.update("jax_enable_preemption_service", False)
    if devices is not None and "JAX_LOCAL_DEVICE_IDS" in os.environ:
        devices = None
    try:
        jax.distributed.initialize(
            address,
            processes,
            process,
            devices,
            cluster_detection_method=method,
            initialization_timeout=_START,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except jax.errors.JaxRuntimeError as error:
        first = next(iter(str(error).splitlines()), "")
        where = "its coordinator" if address is None else address
        raise RuntimeError(
            f"process {process} of {processes} cannot meet the others at {where} ({first}): start "
            f"all of them within {_START} s, process 0 on the host of that address, and let its "
            "port through"
        ) from error
    if group.count() > 1:
        _begin_watch(quiet)
        keep_stdout_from_libraries()
    if not group.is_first():
        rich.get_console().quiet = True


def _begin_watch(quiet: bool) -> None:
    global _watch
    watch = Watch(group.index(), quiet=quiet)
    token = secrets.token_hex(16) if group.is_first() else ""
    port = watch.listen(token) if group.is_first() else 0
    told: list[Any] = [port, token]
    port, token = gather(told)[0]
    if not group.is_first():
        address = distributed.global_state.coordinator_address or ""
        host = address.rpartition(":")[0].strip("[]")
        try:
            watch.connect(host, port, token)
        except OSError as error:
            print(
                f"process {group.index()}: process 0 cannot be watched at {host}:{port} ({error}): "
                f"that one is lost is noticed after {HEARTBEAT} s",
                file=sys.stderr,
            )
    _watch = watch
    # Called before JAX's own, which waits for the others.
    atexit.register(watch.leave)


def _introduce(where: str, console: Console | None) -> None:
    """Says in one line who works together."""
    # In all processes: each waits here for the others to tell their devices.
    local, all_devices = jax.local_device_count(), jax.device_count()
    if not group.is_first():
        return
    (console or rich.get_console()).print(
        f"{group.count()} processes ({where}), each with {local} of {all_devices} devices; this is "
        f"process {group.index()}",
        soft_wrap=True,
    )


def fail(words: str) -> None:
    """Tells the other processes that this one fails; nothing, where it is alone."""
    if _watch is not None:
        _watch.fail(words)


def _with_timeout(flags: str) -> str:
    """XLA's flags with the time-out of collectives on CPU, where jaxlib knows it."""
    if _COLLECTIVE_FLAG in flags:
        return flags
    return " ".join([flags, *known_flags([f"{_COLLECTIVE_FLAG}={COLLECTIVE}"])]).strip()
