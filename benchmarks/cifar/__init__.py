"""CIFAR-10 wholly on the device: accuracy against training time for any list of dense and low-rank variants."""

from benchmarks.cifar.images import SIZES, Images, Size, load
from benchmarks.cifar.runs import run
from benchmarks.cifar.variants import Variant, standard_variants

__all__ = ["SIZES", "Images", "Size", "Variant", "load", "run", "standard_variants"]
