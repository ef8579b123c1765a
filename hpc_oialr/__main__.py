"""``python -m hpc_oialr`` is ``oialr``."""

from hpc_oialr.cli.main import entry

if __name__ == "__main__":
    entry()
