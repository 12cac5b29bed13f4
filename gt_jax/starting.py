"""Ctrl-C while a program imports its modules, for seconds, ends it without a traceback."""

import signal
import threading


def end_at_ctrl_c() -> None:
    """Until `raise_at_ctrl_c`, SIGINT ends the process as the system does, with status 130."""
    _change(signal.default_int_handler, signal.SIG_DFL)


def raise_at_ctrl_c() -> None:
    """Python's KeyboardInterrupt again, for a program that catches it."""
    _change(signal.SIG_DFL, signal.default_int_handler)


def _change(before, after):
    # What the process was started with, as by nohup or in the background of a shell, stays.
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) == before:
        signal.signal(signal.SIGINT, after)
