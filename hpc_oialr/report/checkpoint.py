"""Tensors of a checkpoint by name, read one at a time; nothing in it is executed."""

from __future__ import annotations

import contextlib
import functools
import pickle
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpc_oialr.distributed import World
from hpc_oialr.errors import DataError
from hpc_oialr.system_errors import read_json
from hpc_oialr.train.checkpoint_store import CheckpointStore

# What a folder holds, in the order in which it is looked for: the names that transformers gives.
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
FILES = ("model.safetensors", "pytorch_model.bin")
PLAIN = ("F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")
# Of matrices that are no layer's "weight", such as experts.
EIGHT_BITS = re.compile(r"F[48]|float[48]")
# Names by which GPTQ, AWQ, compressed-tensors, MXFP4 and HQQ store packed matrices.
PACKED = ("qweight", "weight_packed", "weight_blocks", "W_q")
# Where training programs put the state dict among other things.
NESTED = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one checkpoint."""

    path: Path  # what the user named
    shapes: Mapping[str, tuple[int, ...]]  # of every floating-point tensor
    tensor: Callable[[str], Tensor]  # reads one of these, onto the CPU


def open_checkpoint(path: Path) -> Checkpoint:
    """A safetensors or torch file, a folder as transformers writes it, or a checkpoint of a run of this project.

    Raises :class:`DataError` if there is none of these, it is damaged, or reading it would execute code.
    """
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        raise DataError(f"{path} does not exist; must be a checkpoint's file or folder.")
    if (path / "manifest.json").is_file() and re.fullmatch(r"step_\d+", path.name):
        return _of_run(path)
    for name in INDICES:
        if (path / name).is_file():
            return _indexed(path / name)
    found = [path / name for name in FILES if (path / name).is_file()][:1]
    if files := found or sorted(path.glob("*.safetensors")):
        return _of_files(path, files)
    raise DataError(
        f"{path} holds no checkpoint: none of {', '.join((*INDICES, *FILES))}, no other *.safetensors. "
        "Name the file itself, or a run's checkpoints/step_NUMBER."
    )


def _of_file(path: Path) -> Checkpoint:
    if path.suffix != ".safetensors":
        return _of_torch(path)

    def tensor(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            dtypes = {name: each.get_dtype() for name, each in slices.items()}
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items() if "F" in dtypes[name]}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a complete safetensors file ({error}); copy it again.") from error
    # Not above: a DataError is an OSError too.
    _refuse_quantised(path, dtypes)
    return Checkpoint(path, shapes, tensor)


def _of_torch(path: Path) -> Checkpoint:
    """A file of ``torch.save``: a state dict, or a dict that holds one."""
    tensors = {str(n): t for n, t in _state_dict(_load(path), path).items() if isinstance(t, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "no values" if tensor.is_meta else f"a tensor of layout {tensor.layout}"
            raise DataError(f"{path} holds {kind} as {name}; save a dense tensor with its values.")
    _refuse_quantised(path, {name: str(tensor.dtype) for name, tensor in tensors.items()})
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.is_floating_point()}
    return Checkpoint(path, shapes, tensors.__getitem__)


def _of_files(path: Path, files: Sequence[Path]) -> Checkpoint:
    parts = [_of_file(file) for file in files]
    holders = {name: part for part in parts for name in part.shapes}
    shapes = {name: part.shapes[name] for name, part in holders.items()}
    return Checkpoint(path, shapes, lambda name: holders[name].tensor(name))


def _indexed(index: Path) -> Checkpoint:
    try:
        files = sorted({str(file) for file in read_json(index)["weight_map"].values()})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is damaged ({error!r}); copy it again.") from error
    for file in files:
        if Path(file).name != file:
            raise DataError(f"{index} names {file!r}; must be plain names of files beside it.")
        if not (index.parent / file).is_file():
            raise DataError(f"{index} names {file}, which is missing; copy the whole folder.")
    return _of_files(index.parent, [index.parent / file for file in files])


def _of_run(path: Path) -> Checkpoint:
    """``checkpoints/step_00000123`` of a run of this project, dense so far."""
    step = int(path.name.removeprefix("step_"))
    store = CheckpointStore(path.parent, World.single("cpu"))
    try:
        low_rank = store.read_state(step)["controller"]["r"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged (state.json: {error!r}); copy it again.") from error
    if low_rank:
        raise DataError(
            f"{path} is of a low-rank run ({len(low_rank)} layers); must be dense. Its spectra are in the "
            f"run's spectra.h5; for the merged weights: oialr export {path.parent.parent} --format dense "
            f"--step {step}"
        )
    held = {name: each for name, each in store.metadata(step).items() if each[1].is_floating_point}
    shapes = {n.removeprefix("model."): tuple(held[n][0]) for n in held if n.startswith("model.")}

    def tensor(name: str) -> Tensor:
        shape, dtype = held[f"model.{name}"]
        read = torch.empty(shape, dtype=dtype)
        store.read_into(step, {f"model.{name}": read})
        return read

    return Checkpoint(path, shapes, tensor)


def _load(path: Path) -> Any:
    """What ``torch.save`` wrote; torch's own messages for other files are misleading."""
    with path.open("rb") as file:
        start = file.read(16)
    # An archive; a pickle or a tar archive, torch's formats of before 2020.
    if not start.startswith((b"PK", b"\x80")) and not tarfile.is_tarfile(path):
        raise DataError(f"{path} is not a torch file: it begins with {start!r}. Name a .safetensors, .pt or .bin file.")
    load = functools.partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        with contextlib.suppress(RuntimeError):
            # Only what is asked for is read; not possible in the format of before 2020.
            return load(mmap=True)
        return load()
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, pickle.UnpicklingError):
            raise DataError(
                f"{path} holds more than tensors and plain values, and would run code if it were read "
                f"({first}). Save model.state_dict() alone, or as safetensors."
            ) from error
        raise DataError(f"{path} is not a complete torch file ({first}); copy it again.") from error


def _state_dict(loaded: Any, path: Path) -> Mapping[str, Any]:
    if isinstance(loaded, Tensor):
        return {path.stem: loaded}
    if isinstance(loaded, Mapping):
        for key in NESTED:
            if isinstance(loaded.get(key), Mapping) and loaded[key] is not loaded:
                return _state_dict(loaded[key], path)
        if any(isinstance(value, Tensor) for value in loaded.values()):
            return loaded
    raise DataError(f"{path} holds no state dict; must be a dict of tensors, or hold one as {', '.join(NESTED)}.")


def _refuse_quantised(path: Path, dtypes: Mapping[str, str]) -> None:
    """Raise :class:`DataError` if a matrix is stored as numbers that may mean nothing without scales beside it.

    ``dtypes`` are those of all tensors, as safetensors or torch write them.
    """
    for name, dtype in dtypes.items():
        last = name.rpartition(".")[2]
        if last in PACKED or (dtype not in PLAIN and (last == "weight" or EIGHT_BITS.search(dtype))):
            raise DataError(
                f"{path} holds {name} as {dtype}; must be real floating-point numbers of at least 16 bits. Dequantise "
                "the model, e.g. by model.dequantize() of transformers, and save it again, or leave that tensor out."
            )
