"""The connection of a process to process 0, by way of one that outlives it."""

import contextlib
import os
import socket
import threading


class Relay:
    """Passes this process' connection on to process 0, and outlives that one's end.

    JAX's client aborts its process with a page of C++ text at the moment in which its connection closes. The one that
    it has leads here, and stays open when the far one is lost: so it is we who say what happened.
    """

    def __init__(self, host: str, port: int):
        self._target = (host, port)
        self._server = socket.create_server(("127.0.0.1", 0))
        if any(name.lower().endswith("_proxy") for name in os.environ):  # gRPC would look for this one over there
            exempt = "no_grpc_proxy" if "no_grpc_proxy" in os.environ else "no_proxy"
            os.environ[exempt] = ",".join(filter(None, (os.environ.get(exempt), "127.0.0.1")))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.lost = threading.Event()
        self.watched = False  # before, JAX is still trying to connect, and has to see when that fails
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._server.accept()
            try:
                far = socket.create_connection(self._target, timeout=10)
            except OSError:
                near.close()  # process 0 does not listen yet: JAX tries again
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._outward, args=(near, far), daemon=True).start()
            threading.Thread(target=self._inward, args=(far, near), daemon=True).start()

    def _outward(self, near: socket.socket, far: socket.socket) -> None:
        _copy(near, far)
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_RDWR)

    def _inward(self, far: socket.socket, near: socket.socket) -> None:
        _copy(far, near)
        if self.watched:
            self.lost.set()
        else:
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**18):
            sink.sendall(data)
