"""Site files are sourced before anything is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_oialr.doctor.network import check_interfaces
from hpc_oialr.doctor.patient import Patient
from hpc_oialr.doctor.site import environment_of
from hpc_oialr.errors import UnknownNameError


def test_variables_of_a_site_count(tmp_path: Path) -> None:
    file = tmp_path / "site.sh"
    file.write_text("echo loading\nexport NCCL_SOCKET_IFNAME='ib 9'\nexport TWO='a\nb=c'\n")
    environ, (found,) = environment_of(str(file))
    assert (found.name, found.state) == ("site", "ok")
    assert environ["TWO"] == "a\nb=c"
    (interface,) = check_interfaces(Patient(environ=environ))
    assert interface.found.startswith("ib 9: no interface ib 9 here")


@pytest.mark.parametrize(
    ("script", "reason"),
    [("load_module cuda/99", "load_module: command not found"), ("exit 3", "exit code 3")],
)
def test_a_site_file_that_fails_here(tmp_path: Path, script: str, reason: str) -> None:
    file = tmp_path / "site.sh"
    file.write_text(f"{script}\nexport OIALR_SEEN=1\n")
    environ, (found,) = environment_of(str(file))
    assert (found.name, found.state) == ("site", "problem")
    assert reason in found.found
    assert found.fix == f"module avail   (then correct {file})"
    assert "OIALR_SEEN" not in environ
    assert "PATH" in environ


def test_an_unknown_site() -> None:
    with pytest.raises(UnknownNameError, match="unknown site 'atlantis'"):
        environment_of("atlantis")


def test_no_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OIALR_SEEN", "1")
    environ, findings = environment_of(None)
    assert environ["OIALR_SEEN"] == "1"
    assert findings == []
