"""What a site file says: options of sbatch, and variables as they are once it has been sourced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpc_oialr.distributed.environment import all_variables
from hpc_oialr.doctor.finding import Finding, ok, problem
from hpc_oialr.errors import OIALRError, UnknownNameError
from hpc_oialr.launch.site import read_site, site_file


@dataclass(frozen=True)
class SiteEnvironment:
    """Variables, and what they and the site ask of Slurm.

    Attributes
    ----------
    environ
        All variables.
    sbatch
        The site's options of sbatch by their long names; they go before Slurm's own variables.
    findings
        Whether the site file runs here; nothing without one.
    """

    environ: Mapping[str, str]
    sbatch: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def partition(self) -> str | None:
        """Partition that jobs ask for, if they do."""
        return self.sbatch.get("partition") or self.environ.get("SBATCH_PARTITION")

    @property
    def account(self) -> str | None:
        """Account that jobs ask for, if they do."""
        return self.sbatch.get("account") or self.environ.get("SBATCH_ACCOUNT")

    @property
    def runs(self) -> str:
        """Where batch scripts put run folders."""
        return self.environ.get("OIALR_RUNS", "runs")


def site_environment(site: str | None) -> SiteEnvironment:
    """This process's variables, or what batch scripts make of them by sourcing a site file.

    Raises
    ------
    UnknownNameError
        If there is no such site; lists those there are.
    """
    if site is None:
        return SiteEnvironment(all_variables())
    try:
        config = read_site(site, in_job=True)
    except UnknownNameError:
        raise
    except OIALRError as error:
        fix = f"module avail   (then correct {site_file(site)})"
        return SiteEnvironment(all_variables(), findings=(problem("site", str(error), fix),))
    return SiteEnvironment(config.environ, config.sbatch, (ok("site", f"{site}: its file runs here"),))
