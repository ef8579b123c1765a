"""Errors a user can cause: each names the value, the rule it breaks, its origin and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class OIALRError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(OIALRError, ValueError):
    """A setting is out of its range or does not fit the others.

    ``name`` is dotted, e.g. "oialr.rule.beta"; ``rule`` is what the value must satisfy, e.g. "must lie in (0, 1)";
    ``origin`` is a file or the command line, if known; ``fix`` is one sentence that says what to do.
    """

    def __init__(
        self, name: str, value: object, rule: str, *, origin: str | None = None, fix: str | None = None
    ) -> None:
        self.name, self.value, self.rule, self.origin, self.fix = name, value, rule, origin, fix
        source = f" (from {origin})" if origin else ""
        advice = f" {fix}" if fix else ""
        super().__init__(f"{name} is {value!r}{source}; {rule}.{advice}")

    def with_context(self, *, prefix: str = "", origin: str | None = None) -> ConfigError:
        """The same error with its setting's full dotted name and its origin."""
        return ConfigError(f"{prefix}{self.name}", self.value, self.rule, origin=origin or self.origin, fix=self.fix)

    def in_section(self, section: str, origins: Mapping[str, str] | None = None) -> ConfigError:
        """The same error with its setting's full dotted name, and the origin if it is known."""
        parent, _, last = section.rpartition(".")
        if self.name.partition(".")[0] != last:
            parent = section
        prefix = f"{parent}." if parent else ""
        return self.with_context(prefix=prefix, origin=(origins or {}).get(f"{prefix}{self.name}"))


class UnknownNameError(OIALRError, LookupError):
    """A name is not among the valid ones; the message lists them and suggests the nearest match."""

    def __init__(
        self,
        kind: str,
        name: str,
        valid: Iterable[str],
        *,
        origin: str | None = None,
        defaults: Mapping[str, object] | None = None,
    ) -> None:
        self.kind, self.name, self.valid = kind, name, sorted(valid)
        source = f" (from {origin})" if origin else ""
        near = difflib.get_close_matches(name, self.valid, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        listed = self.valid if defaults is None else [f"{each}={defaults[each]!r}" for each in self.valid]
        super().__init__(f"unknown {kind} {name!r}{source}; valid: {', '.join(listed)}.{hint}")


class MissingExtraError(OIALRError, ImportError):
    """An optional package is needed; the message holds the exact install line."""

    def __init__(self, package: str, extra: str, *, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}. Install it with: pip install 'hpc_oialr[{extra}]'")


class TorchVersionError(OIALRError, ImportError):
    """This torch lacks a private name on which a part of the package is built."""


class ModelError(OIALRError, ValueError):
    """Model and optimizer, or model and saved state, do not fit each other."""


class NonFiniteError(OIALRError, ArithmeticError):
    """A weight holds NaN or Inf, or no SVD of it could be computed."""


class ReplicaMismatchError(OIALRError, RuntimeError):
    """Replicas that must be equal bit for bit are not."""


class WorldError(OIALRError, RuntimeError):
    """Launcher, process group and configuration disagree."""


class ProcessLostError(WorldError):
    """Another rank of the run has died or does not answer."""


class HealthError(OIALRError, RuntimeError):
    """A node or rank is not fit for the run, detected before it starts."""


class HostError(OIALRError, RuntimeError):
    """The operating system refuses something, or memory is short; occurs on one rank, not all."""


class DataError(OIALRError, FileNotFoundError):
    """A data file is missing, damaged or has another format."""


class SampleError(DataError):
    """One sample cannot be read; occurs on the rank that loads it, not the others."""


class CheckpointError(OIALRError, RuntimeError):
    """A checkpoint is missing, damaged or belongs to another model."""


class FolderLostError(CheckpointError):
    """The run's folder is gone, or belongs to another run now: nothing may be written there."""


def check_interval(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    closed: tuple[bool, bool] = (False, False),
    fix: str | None = None,
) -> None:
    """Raise :class:`ConfigError` unless ``value`` lies between ``low`` and ``high``."""
    above = value >= low if closed[0] else value > low
    below = value <= high if closed[1] else value < high
    if not (above and below):
        brackets = ("[" if closed[0] else "(") + f"{low:g}, {high:g}" + ("]" if closed[1] else ")")
        raise ConfigError(name, value, f"must lie in {brackets}", fix=fix)
