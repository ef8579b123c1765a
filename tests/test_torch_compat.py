"""Private names of torch stand in one file, and only what is built on one needs it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hpc_oialr
from hpc_oialr import torch_compat
from hpc_oialr.distributed import World
from hpc_oialr.engines import FSDPEngine, TensorEngine
from hpc_oialr.errors import TorchVersionError

PACKAGE = Path(hpc_oialr.__file__).parent
# Operators for lists of tensors, and what torch's documentation tells subclasses of Tensor to use.
DOCUMENTED = re.compile(r"torch\._foreach_\w+|torch\._C\.DisableTorchFunctionSubclass")


def private_names(path: Path) -> list[str]:
    """Dotted names of torch in a file that hold a part which begins with one underscore."""
    found = []
    tree = ast.parse(path.read_text())
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            found.append(ast.unparse(node))
    of_torch = [name for name in found if re.match(r"torch\.[\w.]+$", name) and not name.startswith("torch.ops.aten")]
    return [name for name in of_torch if re.search(r"\._[a-z]\w*|\._C\b", name) and not DOCUMENTED.fullmatch(name)]


def test_private_names_of_torch_stand_in_one_file() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "torch_compat.py"]
    assert {str(path.relative_to(PACKAGE)): private_names(path) for path in files if private_names(path)} == {}
    assert "torch._C._profiler._EventType.Allocation" in private_names(PACKAGE / "torch_compat.py")


def test_an_engine_that_lacks_a_name_says_which_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_param
    from torch.distributed.tensor import _redistribute

    world = World(device=torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.delattr(_fsdp_param, "ParamModuleInfo")
        with pytest.raises(TorchVersionError) as error:
            FSDPEngine(world)
    assert str(error.value) == (
        "FSDPEngine needs torch.distributed.fsdp._fully_shard._fsdp_param.ParamModuleInfo, which torch "
        f"{torch.__version__} does not have. Install torch 2.11 to 2.14."
    )
    with monkeypatch.context() as patch:
        patch.delattr(_redistribute, "_gen_transform_infos")
        with pytest.raises(TorchVersionError, match="TensorEngine needs .*_gen_transform_infos"):
            TensorEngine(world, size=1)
    monkeypatch.setitem(torch_compat._HOMES, "gone", "torch.nowhere")
    with pytest.raises(TorchVersionError, match=r"this needs torch.nowhere.gone"):
        torch_compat.gone  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'never'"):
        torch_compat.never  # noqa: B018


def test_groups_of_fsdp_before_torch_2_13() -> None:
    """One in place of a list."""

    class State:
        _fsdp_param_group: object = None

    module, state = nn.Module(), State()
    module._get_fsdp_state = lambda: state
    assert torch_compat.fsdp_param_groups(module) == []
    state._fsdp_param_group = group = object()
    assert torch_compat.fsdp_param_groups(module) == [group]


# What a machine that has torch and little else does not offer, and names that an older torch lacks.
BARE = '''
import importlib, importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    """Finds all but what is hidden."""

    hidden = set(sys.argv[1].split(","))

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in cls.hidden else super().find_spec(fullname, path, target)

sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import torch
from torch import nn

for module, name in (
    ("torch.distributed.tensor._redistribute", "clear_redistribute_planner_cache"),
    ("torch.distributed.tensor._redistribute", "_gen_transform_infos"),
    ("torch.distributed.fsdp._fully_shard._fsdp_param", "ParamModuleInfo"),
):
    delattr(importlib.import_module(module), name)

from hpc_oialr import OIALR, OIALRConfig, RankLimits, RelativeCutoff, merge, muon_adamw

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 4))
optimizer = muon_adamw(model, lr=1e-3)
settings = OIALRConfig(delay=2, frequency=2, rule=RelativeCutoff(0.6), limits=RankLimits(round_to=8))
oialr = OIALR(model, optimizer, settings)
reports, first = [], 0
for _ in range(6):
    oialr.model(torch.randn(8, 32)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    reports.append(oialr.step())
    first = first or sum(oialr.r.values())
before = oialr.model(torch.ones(1, 32))
dense = merge(model)
assert (dense(torch.ones(1, 32)) - before).abs().max() < 1e-5
assert 0 < sum(oialr.r.values()) < first, "a cut"
print(*(report.kind for report in reports if report))
Finder.hidden -= {"h5py", "safetensors", "transformers", "triton", "yaml"}
for name in ("benchmarks.gpu", "benchmarks.cifar"):
    if importlib.util.find_spec(name):
        importlib.import_module(name)
'''
HIDDEN = (
    *(
        "accelerate",
        "deepspeed",
        "h5py",
        "jsonargparse",
        "lightning",
        "matplotlib",
        "mpi4py",
        "pandas",
        "plotly",
    ),
    *("playwright", "pynvml", "safetensors", "scipy", "submitit", "tensorboard", "timm", "torchvision"),
    *("transformers", "triton", "xarray", "yaml"),
)


def test_torch_alone_trains_converts_and_cuts(tmp_path: Path) -> None:
    script = tmp_path / "bare.py"
    script.write_text(BARE)
    words = [sys.executable, "-W", "error", str(script), ",".join(HIDDEN)]
    # Not installed: they lie beside the package.
    environ = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=300, check=False, cwd=PACKAGE.parent, env=environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["conversion", "update", "update"]
