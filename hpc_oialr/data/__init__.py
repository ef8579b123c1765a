"""Data sets, dealt in global batches that are the same for any number of processes."""

from hpc_oialr.data.augment import FlipAndCrop
from hpc_oialr.data.base import ArrayDataset, Batch, DataConfig, Splits
from hpc_oialr.data.batches import GlobalBatches
from hpc_oialr.data.cache import cache_root
from hpc_oialr.data.catalog import fetchable
from hpc_oialr.data.cifar10 import CIFAR10
from hpc_oialr.data.fashion_mnist import FashionMNIST
from hpc_oialr.data.fetch import fetch
from hpc_oialr.data.image_folder import ImageFolder
from hpc_oialr.data.resized_crop import ResizedCrop
from hpc_oialr.data.samples import write_sample
from hpc_oialr.data.text import TextFolder
from hpc_oialr.data.timeseries import TimeSeriesCSV

__all__ = [
    "CIFAR10",
    "ArrayDataset",
    "Batch",
    "DataConfig",
    "FashionMNIST",
    "FlipAndCrop",
    "GlobalBatches",
    "ImageFolder",
    "ResizedCrop",
    "Splits",
    "TextFolder",
    "TimeSeriesCSV",
    "cache_root",
    "fetch",
    "fetchable",
    "write_sample",
]
