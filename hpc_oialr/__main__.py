"""``python -m hpc_oialr`` is ``oialr``."""

import sys

from hpc_oialr.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
