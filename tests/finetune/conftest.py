"""Tiny models on one thread."""

from support.one_thread import one_thread as one_thread
