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

PIECE = 1 << 16
"""Bytes read at a time, so at most this much has been read and not been answered."""
MAX_LINE = 1 << 20
SLOW = 2.0
"""Seconds after which a connection that does not read its replies is closed, so that others are answered."""
PATIENCE = 0.2
"""Seconds after which a waiting loop looks whether it has been asked to stop."""

Take = Callable[[bytes], str | None]
"""A line to the reply to it, without its line break."""
TOO_LONG = b"\xff"
"""Stands for a line longer than `MAX_LINE`; it is no UTF-8, so it is answered as malformed."""


class _Split:
    """Cuts bytes into lines; one that is longer than `MAX_LINE` is dropped and stands as `TOO_LONG`."""

    def __init__(self) -> None:
        self.rest, self.dropping = b"", False
        self.begun = 0  # bytes of the line that is not over, dropped ones included

    def lines(self, data: bytes) -> Iterator[bytes]:
        *whole, self.rest = (self.rest + data).split(b"\n")
        self.begun = len(self.rest) if whole else self.begun + len(data)
        for line in whole:
            yield TOO_LONG if self.dropping or len(line) > MAX_LINE else line
            self.dropping = False
        if len(self.rest) > MAX_LINE:
            self.rest, self.dropping = b"", True

    def last(self) -> Iterator[bytes]:
        if self.rest or self.dropping:
            yield TOO_LONG if self.dropping else self.rest
        self.rest, self.dropping, self.begun = b"", False, 0


def serve(source: str, take: Take, stop: list[int], after: Callable[[int], None], offset: int = 0) -> int:
    """Answer all lines of `source` until it ends or `stop` is filled.

    Args:
        source: `-` (replies go to standard output), a file, or `tcp://HOST:PORT`, where it then listens;
            replies go back over the connection that the line came from.
        take: answers a line.
        stop: filled by a signal; what has been read is still answered.
        after: called with the bytes taken so far, after every piece.
        offset: bytes of a file to pass over, as they have been taken before.

    Returns:
        Bytes of whole lines taken, `offset` included.
    """
    if source.startswith("tcp://"):
        return _tcp(source, take, stop, after)
    if source == "-":
        return _read(sys.stdin.fileno(), take, stop, after, 0)
    try:
        with open(Path(source), "rb") as file:
            if file.seek(0, io.SEEK_END) < offset:
                raise UsageError(
                    f"{source} is shorter than what was taken of it before; give the same input, or no --state"
                )
            file.seek(offset)
            return _read(file.fileno(), take, stop, after, offset)
    except BrokenPipeError:  # of the output: its reader has gone
        raise
    except OSError as error:
        raise UsageError(f"the input {source} cannot be read ({error.strerror or error})") from None


def _read(handle: int, take: Take, stop: list[int], after: Callable[[int], None], taken: int) -> int:
    split = _Split()
    with selectors.DefaultSelector() if not _is_file(handle) else contextlib.nullcontext() as selector:
        if selector is not None:
            selector.register(handle, selectors.EVENT_READ)
        while not stop:
            if selector is not None and not selector.select(PATIENCE):
                continue
            data = os.read(handle, PIECE)
            replies = [take(line) for line in (split.lines(data) if data else split.last())]
            taken += len(data)
            _write(replies)
            after(taken - split.begun)
            if not data:
                return taken
    return taken - split.begun


def _is_file(handle: int) -> bool:
    return os.fstat(handle).st_mode & 0o170000 == 0o100000


def _write(replies: list[str | None]) -> None:
    text = "".join(f"{reply}\n" for reply in replies if reply is not None)
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _tcp(source: str, take: Take, stop: list[int], after: Callable[[int], None]) -> int:
    try:
        place = urlsplit(source)
        if place.port is None:
            raise ValueError("it names no port")
        address = (place.hostname or "127.0.0.1", place.port)
        server = socket.create_server(address)
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(f"cannot listen at {source} ({error}); give tcp://HOST:PORT with a free port") from None
    taken = 0
    with server, selectors.DefaultSelector() as selector:
        print(f"listening at tcp://{address[0]}:{server.getsockname()[1]}", file=sys.stderr, flush=True)
        selector.register(server, selectors.EVENT_READ, None)
        while not stop:
            for key, _ in selector.select(PATIENCE):
                if key.data is None:
                    connection, _ = server.accept()
                    connection.settimeout(SLOW)
                    selector.register(connection, selectors.EVENT_READ, _Split())
                    continue
                taken += _talk(key.fileobj, key.data, take, selector)  # type: ignore[arg-type]
                after(taken)
        for key in list(selector.get_map().values()):
            if key.data is not None:
                key.fileobj.close()  # type: ignore[union-attr]
    return taken


def _talk(connection: socket.socket, split: _Split, take: Take, selector: selectors.BaseSelector) -> int:
    """Answer what a connection has sent; a broken one is closed, and concerns no other."""
    try:
        data = connection.recv(PIECE)
        replies = [take(line) for line in (split.lines(data) if data else split.last())]
        text = "".join(f"{reply}\n" for reply in replies if reply is not None)
        connection.sendall(text.encode())
    except OSError:
        data = b""
    if not data:
        selector.unregister(connection)
        connection.close()
    return len(data)
