"""Scripts that try what may hang or end a process; each prints JSON objects, one a line, as far as it comes.

They run in an interpreter of their own, as plain files: nothing of this package is imported, nor is torch
where it is not needed.
"""
