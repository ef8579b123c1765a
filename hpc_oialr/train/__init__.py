"""Training: settings (``config``, ``load_config``), a run in its folder (``run``), the loop (``trainer``), checkpoints.

Read ``trainer`` first, then ``tasks``, ``run_context``, ``checkpoint``.
"""
