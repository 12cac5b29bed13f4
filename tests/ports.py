"""Ports for programs that tests start."""

import random
import socket


def free_port() -> int:
    """A port of this machine at which nothing listens, for a program that is yet to start.

    It is below those that the system gives to connections: another test may open hundreds of them
    before the program listens.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:  # taken
            continue
        return port
