"""Errors of the library in the words of the command line."""
import contextlib
@contextlib.contextmanager
def in_options():
    yield
