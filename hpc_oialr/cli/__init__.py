"""The command line: one file per command, with ``add`` to put it into the parser and ``run`` to run it."""
