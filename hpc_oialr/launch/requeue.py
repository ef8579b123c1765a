"""``python -m hpc_oialr.launch.requeue CODE``: what :file:`requeue.sh` beside it does, for batch scripts of one's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.exit(subprocess.call(["sh", str(Path(__file__).with_name("requeue.sh")), *sys.argv[1:]]))
