"""Free TCP ports on 127.0.0.1."""

import socket

_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on and that this process has not handed out before.

    Another process may still take it before it is bound: whoever starts a server checks who answers.
    """
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port
