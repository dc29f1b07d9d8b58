"""The end of one process ends the others: within a second, and in a line.

JAX's heartbeats do it as well, as many seconds later as they may be late, with pages of C++'s
stacks; and a collective whose partner is gone waits longer. So every process holds a connection to
process 0 on which almost nothing is ever said. The operating system closes it when a process dies,
however that comes to pass, and gives it up where a host cannot be reached any more. A process that
fails says so first, with its last words; one that is done says goodbye.

    process 2            process 0            process 1
    kill -9     (close)-> "process 2 was lost"
                          end 2 ------------> ends, silently
                          ends

Whoever is ended so has the exit code `LOST`. Where no connection comes about, as behind a firewall,
there are the heartbeats.
"""

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from typing import Any

# The exit code of a process that another one's end ended; sysexits.h calls it a temporary failure.
LOST = 75

# Seconds until a host that answers nothing any more is given up: idle, then between probes.
_IDLE, _INTERVAL, _PROBES = 3, 2, 4

# Seconds to connect.
_CONNECT = 20.0

# Seconds until the connection shows what a collective may notice first, that its partner is gone;
# and those in which process 0 may fail of the same as another one: of what all find at once, a
# wrong argument say, one line is enough.
_NOTICED, _SAME = 0.3, 1.0

# Seconds that process 0 leaves the others to end before it does.
_LINGER = 3.0

_MOST_WORDS = 60_000


class Watch:
    """This process's side of the connections.

    Args:
        index: Which process this is.
        quiet: Whether a launcher says who was lost.
    """

    def __init__(self, index: int, *, quiet: bool = False):
        self.index, self._quiet = index, quiet
        self._mutex = threading.Lock()
        self._over = threading.Event()  # this process fails or leaves: nothing ends it any more
        self._peers: dict[int, socket.socket] = {}
        self._left: set[int] = set()  # those that need no more words
        self._gone: set[int] = set()  # those whose connection is closed
        self._ending = threading.Event()  # process 0 ends all since another one ended

    # --- process 0 ------------------------------------------------------------------------------

    def listen(self, token: str) -> int:
        """Process 0: lets others connect who know the token; returns the port."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)
        server.setblocking(False)
        self._start(lambda: self._serve(server, token))
        return server.getsockname()[1]

    def _serve(self, server: socket.socket, token: str) -> None:
        selector = selectors.DefaultSelector()
        selector.register(server, selectors.EVENT_READ)
        names: dict[socket.socket, int] = {}
        texts: dict[socket.socket, bytes] = {}
        while True:
            for key, _ in selector.select():
                if key.fileobj is server:
                    connection, _ = server.accept()
                    _keep_alive(connection)
                    texts[connection] = b""
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                connection: Any = key.fileobj
                data = _received(connection)
                *lines, texts[connection] = (texts[connection] + data).split(b"\n")
                for line in lines:
                    message = _read(line)
                    if connection in names:
                        self._heard(names[connection], message)
                    elif message.get("token") == token:
                        names[connection] = message["index"]
                        with self._mutex:
                            self._peers[message["index"]] = connection
                stranger = connection not in names and len(texts[connection]) > _MOST_WORDS
                if not data or stranger:
                    selector.unregister(connection)
                    connection.close()
                    if (gone := names.get(connection)) is not None:
                        self._gone.add(gone)
                        if gone not in self._left:
                            self._start(lambda gone=gone: self._end(gone, None))

    def _heard(self, index: int, message: dict[str, Any]) -> None:
        if "failed" in message:
            self._left.add(index)  # its connection may close before all is said
            self._start(lambda: self._end(index, message["failed"], 2 * _SAME))
        elif "bye" in message:
            self._left.add(index)

    def _end(self, index: int, words: str | None, patience: float = 0.0) -> None:
        """Process 0: ends all since one was lost, or failed with words."""
        time.sleep(patience)
        with self._mutex:
            if self._over.is_set() or self._ending.is_set():
                return
            self._ending.set()
        self._tell_all(index)
        how = "was lost" if words is None else f"failed: {words}"
        self._leave_with(f"process {index} {how}")

    def _tell_all(self, index: int) -> None:
        with self._mutex:
            peers = [(i, peer) for i, peer in self._peers.items() if i != index]
        for _, peer in peers:
            _send(peer, {"end": index})
        # JAX's own service ends with this process, and those that hear of that first print pages.
        deadline = time.monotonic() + _LINGER
        while any(i not in self._gone for i, _ in peers) and time.monotonic() < deadline:
            time.sleep(0.01)

    # --- the others -----------------------------------------------------------------------------

    def connect(self, host: str, port: int, token: str) -> None:
        """Another process: connects to process 0.

        Raises:
            OSError: It cannot be reached there.
        """
        connection = socket.create_connection((host, port), timeout=_CONNECT)
        connection.settimeout(None)
        _keep_alive(connection)
        _send(connection, {"token": token, "index": self.index})
        self._peers[0] = connection
        self._start(lambda: self._listen_to_first(connection))

    def _listen_to_first(self, connection: socket.socket) -> None:
        text = b""
        while data := _received(connection):
            *lines, text = (text + data).split(b"\n")
            for message in map(_read, lines):
                if "bye" in message:
                    return
                if "end" in message and not self._over.is_set():
                    self._leave_with(None)
        if not self._over.is_set():
            self._leave_with("process 0 was lost")

    # --- all ------------------------------------------------------------------------------------

    def fail(self, words: str) -> None:
        """Tells the others that this process fails; returns if it is the one to say why.

        Where another one was lost, which is why this one fails, or where process 0 fails as well,
        this process ends here, silently.
        """
        if self.index == 0:
            time.sleep(_NOTICED)
            with self._mutex:
                ending = self._ending.is_set()
                self._over.set()
            if ending:
                time.sleep(2 * _LINGER)  # that ends this process
            self._tell_all(0)
        else:
            _send(self._peers.get(0), {"failed": words[-_MOST_WORDS:]})
            time.sleep(_SAME)
            self._over.set()

    def leave(self) -> None:
        """Tells the others that this process is done."""
        self._over.set()
        with self._mutex:
            peers = [*self._peers.values()]
        for peer in peers:
            _send(peer, {"bye": self.index})

    def _leave_with(self, words: str | None) -> None:
        if words is not None and not self._quiet:
            with contextlib.suppress(OSError):
                # A bar of progress hides the cursor.
                shown = b"\x1b[?25h" if os.isatty(2) else b""
                os.write(2, shown + f"{words}: all processes end\n".encode())
        os._exit(LOST)

    def _start(self, run: Any) -> None:
        threading.Thread(target=run, name="watch", daemon=True).start()


def _keep_alive(connection: socket.socket) -> None:
    """Has the system ask now and then whether the other host is there; it answers by itself."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _IDLE),
        ("TCP_KEEPINTVL", _INTERVAL),
        ("TCP_KEEPCNT", _PROBES),
        ("TCP_USER_TIMEOUT", 1000 * (_IDLE + _INTERVAL * _PROBES)),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket | None, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who is gone need not be told
        if connection is not None:
            connection.sendall(json.dumps(message).encode() + b"\n")


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except OSError:
        return b""


def _read(line: bytes) -> dict[str, Any]:
    """A message; an empty one of anything else, since anybody may connect."""
    with contextlib.suppress(ValueError, RecursionError):
        message = json.loads(line)
        if isinstance(message, dict):
            return message
    return {}


def watch_launcher(handle: int) -> None:
    """Ends this process when the launcher is gone, however it ended.

    Args:
        handle: The end for reading of a pipe whose other end the launcher holds, and nobody else.
    """

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(handle, 1)
        os._exit(LOST)

    threading.Thread(target=wait, name="launcher", daemon=True).start()
