"""Singular values of every layer at every update: written while a run trains, read at any time.

``hpc_oialr.spectra.open("runs/first")`` gives every layer's singular values and figures.
"""

from hpc_oialr.spectra.reader import Layer, Runs, Spectra, open

__all__ = ["Layer", "Runs", "Spectra", "open"]
