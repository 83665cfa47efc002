"""Where lines come from and where replies go: standard input, a file, or connections to a TCP port."""

import contextlib
import io
import os
import selectors
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from pliant.core import UsageError

TCP = "tcp://"
PIECE = 1 << 16
"""Bytes read at a time, so at most this much has been read and not been answered."""
MAX_LINE = 1 << 20
SLOW = 2.0
"""Seconds after which a connection that does not read its replies is closed, so that others are answered."""
PATIENCE = 0.2
"""Seconds after which a waiting loop looks whether it has been asked to stop."""

Take = Callable[[bytes | None], str | None]
"""A line to the reply to it, without its line break; None stands for a line longer than `MAX_LINE`."""
Save = Callable[[int], None]


class _Work:
    """What is done with lines, wherever they come from."""

    def __init__(self, save: Save, every: int):
        self.save, self.every = save, every
        self.since = 0  # lines since the last save

    def do(
        self, lines: Iterator[bytes | None], take: Take, send: Callable[[str], None], place: Callable[[], int]
    ) -> None:
        """Take all lines and send the replies, those before a save first, so that a continuation lacks none."""
        replies: list[str] = []
        for line in lines:
            if (reply := take(line)) is not None:
                replies.append(f"{reply}\n")
            self.since += 1
            if self.since >= self.every:
                send("".join(replies))
                replies.clear()
                self.save(place())
                self.since = 0
        send("".join(replies))


class _Split:
    """Cuts bytes into lines; one that is longer than `MAX_LINE` is dropped and given as None.

    Attributes:
        taken: bytes of the lines that have been given, with their line breaks.
    """

    def __init__(self) -> None:
        self.rest, self.dropped, self.taken = b"", 0, 0

    def lines(self, data: bytes) -> Iterator[bytes | None]:
        """Those that end in `data`; without any data the input has ended, and with it its last line."""
        *whole, self.rest = (self.rest + data).split(b"\n")
        for line in whole:
            yield self._give(line, 1)
        if not data and (self.rest or self.dropped):
            line, self.rest = self.rest, b""
            yield self._give(line, 0)
        if len(self.rest) > MAX_LINE:
            self.dropped, self.rest = self.dropped + len(self.rest), b""

    def _give(self, line: bytes, end: int) -> bytes | None:
        long = self.dropped > 0 or len(line) > MAX_LINE
        self.taken, self.dropped = self.taken + self.dropped + len(line) + end, 0
        return None if long else line


def serve(source: str, begin: Callable[[], Take], save: Save, every: int, stop: list[int], offset: int = 0) -> int:
    """Answer all lines of `source` until it ends or `stop` is filled.

    Args:
        source: `-` (replies go to standard output), a file, or `tcp://HOST:PORT`, where it then listens;
            replies go back over the connection that the line came from.
        begin: called for each connection, else once; gives what answers its lines.
        save: called after every so many lines with what this returns at the end.
        every: so many.
        stop: filled by a signal; what has been read is still answered.
        offset: bytes of a file to pass over, as they have been taken before.

    Returns:
        Bytes of whole lines taken, `offset` included; 0 for connections, which cannot be gone on with.
    """
    work = _Work(save, every)
    if source.startswith(TCP):
        _tcp(source, work, begin, stop)
        return 0
    if source == "-":
        return _read(sys.stdin.fileno(), work, begin(), stop, 0)
    try:
        with open(Path(source), "rb") as file:
            if file.seek(0, io.SEEK_END) < offset:
                raise UsageError(
                    f"{source} is shorter than what was taken of it before; give the same input, or no --state"
                )
            file.seek(offset)
            return _read(file.fileno(), work, begin(), stop, offset)
    except BrokenPipeError:  # of the output: its reader has gone
        raise
    except OSError as error:
        raise UsageError(f"the input {source} cannot be read ({error.strerror or error})") from None


def _read(handle: int, work: _Work, take: Take, stop: list[int], offset: int) -> int:
    split = _Split()
    with selectors.DefaultSelector() if not _is_file(handle) else contextlib.nullcontext() as selector:
        if selector is not None:
            selector.register(handle, selectors.EVENT_READ)
        while not stop:
            if selector is not None and not selector.select(PATIENCE):
                continue
            data = os.read(handle, PIECE)
            work.do(split.lines(data), take, _write, lambda: offset + split.taken)
            if not data:
                break
    return offset + split.taken


def _is_file(handle: int) -> bool:
    return os.fstat(handle).st_mode & 0o170000 == 0o100000


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _tcp(source: str, work: _Work, begin: Callable[[], Take], stop: list[int]) -> None:
    try:
        place = urlsplit(source)
        if place.port is None:
            raise ValueError("it names no port")
        address = (place.hostname or "127.0.0.1", place.port)
        server = socket.create_server(address)
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(f"cannot listen at {source} ({error}); give tcp://HOST:PORT with a free port") from None
    with server, selectors.DefaultSelector() as selector:
        print(f"listening at tcp://{address[0]}:{server.getsockname()[1]}", file=sys.stderr, flush=True)
        selector.register(server, selectors.EVENT_READ, None)
        stopping = False
        while not stopping:
            # Asked to stop, it still answers what has arrived, so that what it leaves unread came later.
            stopping = bool(stop)
            for key, _ in selector.select(0 if stopping else PATIENCE):
                if key.data is None:
                    if stopping:
                        continue
                    connection, _ = server.accept()
                    connection.settimeout(SLOW)
                    selector.register(connection, selectors.EVENT_READ, _Peer(connection, begin()))
                    continue
                peer = key.data
                work.do(peer.lines(), peer.take, peer.send, lambda: 0)
                if peer.ended or peer.broken:
                    selector.unregister(peer.connection)
                    peer.connection.close()
        for key in list(selector.get_map().values()):
            if key.data is not None:
                key.data.connection.close()


class _Peer:
    """A connection. Once it has ended or is broken it can be closed, which concerns no other."""

    def __init__(self, connection: socket.socket, take: Take):
        self.connection, self.take, self.split = connection, take, _Split()
        self.ended = self.broken = False

    def lines(self) -> Iterator[bytes | None]:
        """Those that it has sent."""
        try:
            data = self.connection.recv(PIECE)
        except OSError:
            self.broken = True
            return
        self.ended = not data
        yield from self.split.lines(data)

    def send(self, text: str) -> None:
        if self.broken:
            return
        try:
            self.connection.sendall(text.encode())
        except OSError:
            self.broken = True
