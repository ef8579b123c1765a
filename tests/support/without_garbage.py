"""Imported before all else where everything that is imported stays."""

import gc

gc.disable()
