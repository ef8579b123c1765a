"""The command line: one file per command; its docstring is the summary, ``add`` adds options, ``run`` runs it."""
