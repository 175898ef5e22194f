"""Who of a group of processes is still there, so that nobody waits for the dead.

Every process keeps a connection to the first one, beside those that carry tensors. The system
closes it when a process ends, however it ends, and the first one tells the others who it was. A
process that ends well says so before; one that ends with an error says which. A machine that is
gone without a word is found out by the keep-alive probes of TCP.

What waits for a process that is gone mostly fails by itself (gloo), or never returns (NCCL): a
process that has not ended some seconds after another is gone is ended from here.
"""

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import PeerLost

GRACE_SECONDS = 5.0
"""What a process may take to end by itself once another is gone."""
JOIN_SECONDS = 30.0
VERDICT_SECONDS = 2.0
"""How long to wait for the name of the one that is gone, after something failed."""
_KEEP_ALIVE = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}
_LONGEST = 4096
_BYE = "bye"


@dataclass(frozen=True, slots=True)
class Lost:
    """A process that is gone. why: in a few words."""

    rank: int
    why: str


class Peers:
    """Watches over the other processes of a group, in a thread of its own.

    share: gives the first process's text to all (`World.share`). hint: says how to go on, when
    it is asked for.
    """

    def __init__(self, rank: int, size: int, share: Callable[[str], str]) -> None:
        self.rank, self.size = rank, size
        self.hint: Callable[[], str | None] = lambda: None
        self.lost: Lost | None = None
        self._known = threading.Event()
        self._closed = threading.Event()
        self._lines: dict[socket.socket, tuple[int, str]] = {}  # whose, and what came of a line
        self._present: set[int] = set()
        self._selector = selectors.DefaultSelector()
        if rank == 0:
            self._gather(share)
        else:
            self._join(share)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    # ---- getting together --------------------------------------------------------------------

    def _gather(self, share: Callable[[str], str]) -> None:
        token = secrets.token_hex(16)
        with _listener() as server:
            host, port = server.getsockname()[:2]
            share(f"{host} {port} {token}")
            server.settimeout(JOIN_SECONDS)
            while len(self._lines) < self.size - 1:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    rank = min({*range(1, self.size)} - self._present)
                    self.lost = Lost(rank, "it never joined")
                    raise self.error() from None
                connection.settimeout(JOIN_SECONDS)
                with contextlib.suppress(OSError, ValueError):
                    given, name = _read_line(connection).split()
                    if secrets.compare_digest(given, token):
                        self._add(connection, int(name))
                        continue
                connection.close()  # somebody else's

    def _join(self, share: Callable[[str], str]) -> None:
        host, port, token = share("").split()
        connection = socket.create_connection((host, int(port)), timeout=JOIN_SECONDS)
        connection.sendall(f"{token} {self.rank}\n".encode())
        self._add(connection, 0)

    def _add(self, connection: socket.socket, rank: int) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
        connection.settimeout(1)
        self._lines[connection] = rank, ""
        self._present.add(rank)
        self._selector.register(connection, selectors.EVENT_READ)

    # ---- watching ----------------------------------------------------------------------------

    def _watch(self) -> None:
        while self._lines and not self._closed.is_set() and self.lost is None:
            for key, _ in self._selector.select(timeout=0.2):
                self._hear(key.fileobj)  # type: ignore[arg-type]
        if self.lost is None:
            return
        self._known.set()
        self._tell(f"lost {self.lost.rank} {self.lost.why}")
        if not self._closed.wait(GRACE_SECONDS):
            sys.stderr.write(f"error: {self.error()}\n")
            sys.stderr.flush()
            os._exit(PeerLost.exit_code)

    def _hear(self, connection: socket.socket) -> None:
        rank, text = self._lines[connection]
        try:
            received = connection.recv(_LONGEST)
        except TimeoutError:
            return
        except OSError as error:
            received, text = b"", f"unreachable: {error.strerror or error}\n" if not text else text
        text += received.decode(errors="replace")
        self._lines[connection] = rank, text
        if received and "\n" not in text and len(text) < _LONGEST:
            return
        self._understand(rank, text.partition("\n")[0])
        self._selector.unregister(connection)
        connection.close()
        del self._lines[connection]

    def _understand(self, rank: int, line: str) -> None:
        """What a process said last. Nothing at all: it was killed."""
        kind, _, rest = line.partition(" ")
        if kind == _BYE or self.lost is not None:
            self._present.discard(rank)
        elif kind == "lost":
            number, _, why = rest.partition(" ")
            self.lost = Lost(int(number), why)
        elif kind == "failed":
            self.lost = Lost(rank, f"it ended with an error: {rest}")
        else:
            self.lost = Lost(rank, line or "it was killed, or ended without a word")

    def _tell(self, line: str) -> None:
        """Everybody whom this process is connected to."""
        content = (" ".join(line.split())[: _LONGEST - 2] + "\n").encode()
        for connection in list(self._lines):
            with contextlib.suppress(OSError):
                connection.sendall(content)

    # ---- what came of it ---------------------------------------------------------------------

    def verdict(self) -> bool:
        """Whether a process is gone, after something failed here; waits a little for the news."""
        return self._known.wait(VERDICT_SECONDS)

    def error(self) -> PeerLost:
        """What to raise when one is gone."""
        assert self.lost is not None
        return PeerLost(
            f"rank {self.lost.rank} of {self.size} is gone: {self.lost.why}",
            expected="all processes of the group to go on",
            hint=self.hint(),
            rank=self.lost.rank,
        )

    def close(self, failure: BaseException | None = None) -> None:
        """Say goodbye, or that this process ends with an error; watching ends."""
        if self.lost is None:
            kind = type(failure).__name__
            self._tell(_BYE if failure is None else f"failed {kind}: {failure}")
        self._closed.set()
        self._thread.join()
        for connection in self._lines:
            connection.close()
        self._selector.close()


def _listener() -> socket.socket:
    """Where the first process is reached, on a port that the system chooses."""
    address = os.environ.get("MASTER_ADDR", "")
    try:
        return socket.create_server((address, 0))
    except OSError:  # a name that means another interface here
        host = socket.gethostname()
        return socket.create_server((host, 0))


def _read_line(connection: socket.socket) -> str:
    text = b""
    while not text.endswith(b"\n") and len(text) < _LONGEST:
        received = connection.recv(1)
        if not received:
            break
        text += received
    return text.decode(errors="replace")
