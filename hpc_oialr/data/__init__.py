"""Data sets in global batches that are the same for any number of ranks and after a resume."""

from hpc_oialr.data.base import ArrayDataset, Batch, CounterRNG, DataConfig, Splits
from hpc_oialr.data.batches import GlobalBatches
from hpc_oialr.data.ett import ETT
from hpc_oialr.data.fetch import cache_root, fetch
from hpc_oialr.data.image_arrays import CIFAR10, FashionMNIST, FlipAndCrop
from hpc_oialr.data.image_folder import ImageFolder, ResizedCrop
from hpc_oialr.data.image_shards import ImageShards, pack
from hpc_oialr.data.samples import write_sample
from hpc_oialr.data.text import TextFolder
from hpc_oialr.data.text_classes import TextClasses
from hpc_oialr.data.timeseries import TimeSeriesCSV
from hpc_oialr.data.token_files import TokenFiles, tokenize

__all__ = [
    "CIFAR10",
    "ETT",
    "ArrayDataset",
    "Batch",
    "CounterRNG",
    "DataConfig",
    "FashionMNIST",
    "FlipAndCrop",
    "GlobalBatches",
    "ImageFolder",
    "ImageShards",
    "ResizedCrop",
    "Splits",
    "TextClasses",
    "TextFolder",
    "TimeSeriesCSV",
    "TokenFiles",
    "cache_root",
    "fetch",
    "pack",
    "tokenize",
    "write_sample",
]
