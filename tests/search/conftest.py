from __future__ import annotations

import pytest

pytest.importorskip("optuna", reason="optuna is not installed: pip install 'hpc_oialr[search]'")
