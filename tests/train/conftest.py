from __future__ import annotations

from support.one_thread import one_thread as one_thread
