"""The method, its layers, optimizers and linear algebra, where nothing else of the package can be imported."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys

CORE = ("method", "lowrank", "optim", "linalg", "errors", "lazy", "torch_compat", "system_errors")
FOREIGN = ("h5py", "transformers", "mpi4py", "deepspeed", "submitit", "yaml", "jsonargparse", "rich", "safetensors")

class Hidden:
    def find_spec(self, name, path=None, target=None):
        top, _, rest = name.partition(".")
        if top in FOREIGN or (top == "hpc_oialr" and rest and rest.split(".")[0] not in CORE):
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
import torch
from torch import nn
from hpc_oialr import OIALR, FixedFraction, OIALRConfig, merge, muon_adamw

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
optimizer = muon_adamw(model)
config = OIALRConfig(delay=4, frequency=2, rule=FixedFraction(0.25), layer_share_step=1.0, stability_frequency=2)
oialr = OIALR(model, optimizer, config)
reports = []
for step in range(10):
    x, y = torch.randn(8, 16), torch.randint(0, 4, (8,))
    nn.functional.cross_entropy(oialr.model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    reports.append(oialr.step())
model.load_state_dict(model.state_dict())
assert oialr.r == {"0": 4, "2": 8}, oialr.r
assert [r.kind for r in reports if r][-1] == "update"
assert type(merge(model)[0]) is nn.Linear
print("trained")
"""


def test_it_trains_by_itself() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == "trained\n", done.stderr
