"""Wrong PMI, missing mpi4py, missing library: with modules that play mpi4py in a real process."""

from __future__ import annotations

import pytest
from support.fake_programs import HEALTHY
from support.slurm_step import step

from hpc_oialr.commands import Answer
from hpc_oialr.doctor import mpi

PLACE = """
class COMM_WORLD:
    rank, size = {rank}, {size}
THREAD_FUNNELED = 1
Init_thread = Finalize = lambda *_: None
Get_library_version = lambda: "{library}, package: X"
"""
STEP = step(3)
PMIX = {"PMIX_RANK": "3"}


@pytest.fixture
def mpi4py(tmp_path):
    """Writes a package of that name; the variables that let it be found."""

    def write(module: str, package: str = '__version__ = "4.1"\nclass rc: pass\n') -> dict[str, str]:
        folder = tmp_path / "modules" / "mpi4py"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(package)
        (folder / "MPI.py").write_text(module)
        return {"PYTHONPATH": str(folder.parent)}

    return write


def test_mpi_that_agrees_with_srun(context, mpi4py):
    found = mpi4py(PLACE.format(rank=3, size=4, library="Open MPI v5.0.7"))
    library, ranks = mpi.check_mpi(context(STEP | PMIX | found))
    assert (library.state, library.found) == ("ok", "mpi4py 4.1, Open MPI v5.0.7")
    assert (ranks.state, ranks.found) == ("ok", "Open MPI v5.0.7 counts rank 3 of 4, as slurm does")


@pytest.mark.parametrize(
    ("library", "plugin"),
    [("Open MPI v5.0.7", "pmix"), ("Intel(R) MPI Library 2021.13", "pmi2"), ("MPICH", "pmi2")],
)
def test_the_wrong_pmi(context, mpi4py, library, plugin):
    found = mpi4py(PLACE.format(rank=0, size=1, library=library))
    _, ranks = mpi.check_mpi(context(STEP | PMIX | found))
    assert (ranks.name, ranks.state) == ("MPI ranks", "problem")
    assert ranks.found == f"{library} counts rank 0 of 1, slurm counts 3 of 4"
    assert ranks.fix.startswith(f"srun --mpi={plugin} ")


def test_the_wrong_pmi_ends_open_mpi(context, mpi4py):
    module = PLACE.format(rank=0, size=1, library="Open MPI v4.1.4")
    dies = module + "import os\ndef Init_thread(_): os.write(2, b'PMI2_Init failed'); os._exit(14)\n"
    _, ranks = mpi.check_mpi(context(STEP | PMIX | mpi4py(dies)))
    assert (ranks.state, ranks.found) == ("problem", "Open MPI v4.1.4 does not start: PMI2_Init failed")
    assert ranks.fix.startswith("srun --mpi=pmix ")


def test_mpi_that_hangs_in_its_start(context):
    ranks = mpi.rank_finding(context(STEP | PMIX), {"library": "MPICH v4"}, Answer(trouble="hung"))
    assert (ranks.state, ranks.found) == ("problem", "MPICH v4 does not start: no answer in time")
    assert ranks.fix.startswith("srun --mpi=pmi2 ")


def test_missing_mpi4py(context, mpi4py):
    environ = mpi4py("", package="raise ImportError('no such package')")
    (alone,) = mpi.check_mpi(context(environ))
    (started,) = mpi.check_mpi(context(STEP | PMIX | environ))
    assert (alone.state, started.state) == ("note", "problem")
    assert started.found == "no mpi4py (no such package), and MPI started this process"
    assert started.fix == alone.fix == 'pip install "hpc_oialr[mpi]"'


def test_missing_library(context, mpi4py):
    environ = mpi4py("raise RuntimeError('cannot load MPI library')")
    (found,) = mpi.check_mpi(context(STEP | PMIX | environ))
    assert found.state == "problem"
    assert found.found.startswith("mpi4py finds no MPI library (cannot load MPI library)")
    assert found.fix == "module load openmpi, or, as root: apt-get install openmpi-bin"


def test_in_a_step_without_mpi_it_is_not_started(context, mpi4py):
    module = PLACE.format(rank=0, size=1, library="MPICH v4") + "def Init_thread(_): raise SystemExit(3)\n"
    (found,) = mpi.check_mpi(context(STEP | mpi4py(module)))
    assert (found.state, found.found) == ("ok", "mpi4py 4.1, MPICH v4")


@pytest.mark.parametrize(
    ("library", "plugins", "state", "fix"),
    [
        ("Open MPI v4.1.4", ["pmi2", "pmix"], "ok", ""),
        ("Open MPI v4.1.4", ["pmi2"], "problem", "srun --mpi=none, or the library's own mpirun"),
        ("MPICH Version: 4.3", ["pmi2"], "ok", ""),
        ("Intel(R) MPI Library 2021.13", [], "problem", "srun --mpi=none"),
        ("CRAY MPICH version 8.1", ["cray_shasta", "pmi2"], "ok", ""),
    ],
)
def test_plugins(library, plugins, state, fix):
    found = mpi.plugin_finding(library, "\n".join(["MPI plugin types are...", "\tnone", *plugins]))
    assert (found.name, found.state) == ("MPI plugin", state)
    assert found.fix.startswith(fix)


def test_the_plugin_that_batch_scripts_take():
    found = mpi.plugin_finding("Open MPI v4.1.4", "pmi2\npmix", "pmi2")
    assert (found.state, found.fix) == ("problem", "export OIALR_MPI=pmix")
    assert found.found == "batch scripts take srun --mpi=pmi2; Open MPI v4.1.4 needs pmix"
    assert mpi.plugin_finding("Open MPI v4.1.4", "pmi2\npmix", "none").state == "ok"


def test_srun_without_the_librarys_plugin(context, programs, mpi4py):
    programs.put_cluster()
    programs.put("srun", err="MPI plugin types are...\n\tnone\n\tpmi2")
    environ = mpi4py(PLACE.format(rank=0, size=1, library="Open MPI v4.1.4"))
    _, plugin = mpi.check_mpi(context(environ))
    assert plugin.state == "problem"
    assert plugin.found.startswith("Open MPI v4.1.4 needs srun's plugin pmix, which has: pmi2;")
    programs.put("srun", HEALTHY["srun"])
    _, plugin = mpi.check_mpi(context(environ))
    assert (plugin.state, plugin.found) == ("ok", "Open MPI v4.1.4: srun --mpi=pmix")


def test_mpi_that_does_not_end(context):
    report = {"library": "MPICH", "rank": 3, "size": 4}
    found = mpi.rank_finding(context(STEP | PMIX), report, Answer(trouble="hung"))
    assert found.state == "problem"
    assert found.found == "MPICH counts rank 3 of 4, but MPI does not end: no answer in time"
