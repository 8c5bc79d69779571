"""The roll of a job: its processes watch each other, and when one fails or is lost, all end with one message.

Every process holds a connection to the first one and sends a heartbeat at intervals. A process that is killed closes
its connection, so the others are notified at once. One whose machine or network is down sends nothing, and counts as
failed after `HEARTBEAT_TIMEOUT` seconds. A process that is notified may be blocked in a collective that never ends, so
it is ended from a thread.
"""

import contextlib
import json
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from . import processes

HEARTBEAT_TIMEOUT = 60.0
"""Seconds after which a process that says nothing is lost."""
HEARTBEAT = 5.0
"""Seconds between two signs of life."""
GRACE = 1.0
"""Seconds between the first report and the end: the cause may arrive after its consequences."""
LONGEST = 1 << 20
"""Bytes of a message at most."""

_advice: list[Callable[[], str]] = []


@contextlib.contextmanager
def advised(advice: Callable[[], str]) -> Iterator[None]:
    """Meanwhile, the message about a lost process ends with what `advice` says.

    After an error, too: it may be what became of a collective with the lost process, and be here first.
    """
    _advice[:] = [advice]
    yield
    _advice.clear()


@dataclass(frozen=True)
class Report:
    """Why a job must end."""

    process: int
    rank: int
    """What explains more comes first: 0 a lost process, 1 an error, 2 an error that follows from another process's."""
    text: str
    code: int = 1
    """Of the exit."""


class Line:
    """A connection that carries JSON, a line each. Anybody may be at its other end."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.process = -1
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Sends a message; whoever is gone misses it, and is noticed when we read."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that are there, or None at the end of the connection."""
        try:
            data = self.connection.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        try:
            return [dict(json.loads(each)) for each in whole] if len(self._rest) <= LONGEST else None
        except (ValueError, TypeError, RecursionError):  # of no process of ours
            return None

    def wait(self) -> None:
        """Returns when the other end is closed, or after a second."""
        with contextlib.suppress(OSError):
            self.connection.settimeout(1.0)
            while self.connection.recv(1 << 16):
                pass


class Watchdog:
    """This process's part of it; every process makes one at the same place.

    Raises ConnectionError, in all of them, where one cannot reach the first.
    """

    def __init__(self) -> None:
        self.index, count = jax.process_index(), jax.process_count()
        listener = _listener(count) if self.index == 0 else None
        card = {"host": socket.gethostname()}
        if listener is not None:
            card |= {"addresses": ",".join(_addresses()), "port": str(listener.getsockname()[1])}
            card |= {"secret": secrets.token_hex(16)}  # whoever scans ports is not on the roll
        cards = processes.gather(card)
        self.hosts = [card["host"] for card in cards]
        self._secret = cards[0]["secret"]
        self._reports: list[Report] = []
        self._since = 0.0
        """When the first report came."""
        self._ended: set[int] = set()
        self._lines: dict[int, Line] = {}
        self._heard = dict.fromkeys(range(1, count), time.monotonic())
        self._over = threading.Event()
        problem = ""
        if listener is None:
            try:
                self._line = _connected(cards[0], self.hosts[self.index])
                self._line.send(process=self.index, secret=self._secret)
            except (OSError, ValueError) as error:  # all must hear of it
                problem = f"{error}"
        if problem := next(filter(None, processes.gather(problem)), ""):
            raise ConnectionError(problem)
        self._thread = threading.Thread(target=self._watch, args=(listener,), name="roll", daemon=True)
        self._thread.start()

    def _watch(self, listener: socket.socket | None) -> None:
        try:
            self._watch_first() if listener is None else self._watch_all(listener)
        except BaseException as error:  # nobody would hear of the others any more, and wait for them
            stop(f"error: the processes of this job cannot watch each other: {error!r}")

    def end(self) -> None:
        """Leaves the roll, when every process has got to the end."""
        self._over.set()
        if self.index:
            self._line.send(ended=True)
        self._thread.join()
        if self.index:
            self._line.connection.close()

    def fail(self, text: str, code: int) -> None:
        """Tells the others why this process can't go on; it is ended with them, and so never returns.

        Without a text, this process has said itself what there is to say.
        """
        follows = re.match(r"(\w+: )*[A-Z_]+: ", text) is not None  # XLA's errors begin with a status
        report = Report(self.index, 2 if follows else 1, text, code)
        if self.index == 0:
            self._reports.append(report)
        else:
            self._line.send(rank=report.rank, text=text, code=code)
        self._thread.join(HEARTBEAT_TIMEOUT + 2 * GRACE)
        stop(text, code)  # nobody answered

    # In the first process.

    def _watch_all(self, listener: socket.socket) -> None:
        with listener, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            beat = time.monotonic()
            while not (self._over.is_set() and len(self._ended) == len(self._heard)):
                for key, _ in selector.select(timeout=0.2):
                    if key.fileobj is listener:
                        try:
                            connection = listener.accept()[0]
                        except OSError:  # whoever it was is gone, or there are too many of them
                            time.sleep(0.1)
                            continue
                        connection.settimeout(HEARTBEAT)
                        selector.register(connection, selectors.EVENT_READ, Line(connection))
                    elif not self._answer(key.data):
                        selector.unregister(key.fileobj)
                        key.data.connection.close()
                now = time.monotonic()
                for process, last in self._heard.items():
                    if now - last > HEARTBEAT_TIMEOUT:
                        self._lost(process, f"nothing was heard of it for {HEARTBEAT_TIMEOUT:.0f} seconds")
                if now - beat > HEARTBEAT:
                    beat = now
                    for line in self._lines.values():
                        line.send()
                self._judge(now)
        for line in self._lines.values():
            line.send(over=True)
            line.connection.close()

    def _answer(self, line: Line) -> bool:
        """Hears what a process says; whether its connection is still there, and that of a process of ours."""
        messages = line.read()
        if messages is None and line.process > 0:
            self._lost(line.process, "it was killed, or its machine went down")
        for message in messages or ():
            if line.process < 0:
                if message.get("secret") != self._secret:
                    return False
                line.process = message["process"]
                self._lines[line.process] = line
            self._heard[line.process] = time.monotonic()
            self._note(line.process, message)
        return messages is not None

    def _note(self, process: int, message: dict[str, Any]) -> None:
        if message.get("ended"):
            self._ended.add(process)
        if "text" in message:
            self._reports.append(Report(process, message["rank"], message["text"], message["code"]))

    def _lost(self, process: int, how: str) -> None:
        if process in self._ended:
            return
        self._ended.add(process)
        self._reports.append(Report(process, 0, f"error: {self._named(process)} was lost: {how}"))

    def _named(self, process: int) -> str:
        return f"process {process} of {len(self.hosts)} (on {self.hosts[process]})"

    def _judge(self, now: float) -> None:
        """Once the reports are in, ends every process with the one that explains most; the first process tells it."""
        if not self._reports:
            return
        self._since = self._since or now
        report = min(self._reports, key=lambda report: (report.rank, report.process))
        if report.rank and now - self._since < GRACE:
            return
        for line in self._lines.values():
            line.send(stop=report.code)
        text = report.text
        if report.rank and report.process:
            said = text or f"it ended with code {report.code}; its own output says more"
            text = f"{self._named(report.process)}: {said}"
        stop(text, report.code, advise=report.rank == 0, last=self._wait)

    def _wait(self) -> None:
        """Until the others are gone: the runtime of one that loses us first aborts it, with a stack trace."""
        for line in self._lines.values():
            line.wait()

    # In the others.

    def _watch_first(self) -> None:
        heard = time.monotonic()
        beat = 0.0
        self._line.connection.settimeout(HEARTBEAT)
        selector = selectors.DefaultSelector()
        selector.register(self._line.connection, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=min(HEARTBEAT, 1.0)):
                messages = self._line.read()
                if messages is None:
                    if self._over.is_set():
                        return
                    stop(f"error: {self._named(0)} was lost: it was killed, or its machine went down", advise=True)
                heard = time.monotonic()
                for message in messages or ():
                    if "stop" in message:
                        stop("", message["stop"])
                    if "over" in message:
                        return
            now = time.monotonic()
            if now - beat > HEARTBEAT:
                beat = now
                self._line.send()
            if now - heard > HEARTBEAT_TIMEOUT:
                how = f"nothing was heard of it for {HEARTBEAT_TIMEOUT:.0f} seconds"
                stop(f"error: {self._named(0)} was lost: {how}", advise=True)


def stop(text: str, code: int = 1, *, advise: bool = False, last: Callable[[], None] | None = None) -> None:
    """Ends this process at once: its main thread may wait for others who never come. `last` is done before.

    Nothing keeps it: neither errors, nor a disk or a terminal that hangs.
    """
    try:
        late = threading.Timer(5, os._exit, [code])
        late.daemon = True
        late.start()
        if text and sys.stderr.isatty():
            text = "\x1b[?25h\r" + text  # a live display may have hidden the cursor
        with contextlib.suppress(OSError):
            if text:  # at once: the runtime notices a lost process too, and ends us without a word on what to do
                os.write(2, text.encode())
            if advise:
                with contextlib.suppress(Exception):
                    os.write(2, "".join(f"; {advice()}" for advice in _advice).encode())
            if text:
                os.write(2, b"\n")
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        if last is not None:
            last()
    finally:
        os._exit(code)


def _listener(backlog: int) -> socket.socket:
    """At any port of all addresses, of IPv6 too where there is that."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _addresses() -> list[str]:
    """Addresses of this machine that others may reach it at, the likeliest first."""
    found: list[str] = []
    for family, nowhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((nowhere, 9))  # nothing is sent: the address that leads out is chosen
            found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found += [f"{info[4][0]}" for info in socket.getaddrinfo(socket.gethostname(), None)]
    return [each for each in dict.fromkeys(found) if not each.startswith(("127.", "::1", "fe80:"))]


def _connected(card: dict[str, str], host: str) -> Line:
    """A connection to the first process. Raises ConnectionError where there is none to be had."""
    named = os.environ.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")[0].strip("[]")
    here = "127.0.0.1" if card["host"] == host else ""
    tried = [each for each in dict.fromkeys([named, here, *card["addresses"].split(",")]) if each]
    for address in tried:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((address, int(card["port"])), timeout=10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return Line(connection)
    raise ConnectionError(
        f"this process, on {host}, cannot reach the first one, on {card['host']} (tried {', '.join(tried)}, port "
        f"{card['port']}): let the processes of a job connect to each other at any port"
    )
