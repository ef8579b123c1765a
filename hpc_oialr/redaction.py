"""Mask secrets in what a run writes: passwords in addresses, tokens, keys."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_NAME = re.compile(
    r"TOKEN|KEY|PASSW|PASSPHRASE|PWD|SECRET|CREDENTIAL|JWT|AUTH|SIGNATURE|COOKIE|BEARER"
    # Short words at the end only; I_MPI_PIN is no secret.
    r"|(?:^|(?<!MPI)[_.-])(?:PASS|PIN|SAS|DSN|SESSION(?:_?ID)?)$",
    re.IGNORECASE,
)
# Names of numbers that are secrets too, which max_tokens is not.
_PLAIN_SECRET = re.compile(r"PASSW|PWD|SECRET|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
# https://user:password@host, where a password may hold another @; a path of it has one slash
_ADDRESS = re.compile(r"(\b[a-z][\w+.-]*:/{1,2})[^/\s'\"]+@", re.IGNORECASE)
# The same without https://; a signal is B:USR2@60, an image name:tag@sha256:...
_LOGIN = re.compile(r"(?<![\w./@:+-])[\w.+-]+:[^\s/@:'\"]+@(?=[a-z])(?!sha\d)", re.IGNORECASE)
_WORD = (
    r"(?:token|(?:api|access|private|account)[_-]?key|passw(?:or)?d|passphrase|pwd|secret|credential|cookie|jwt|signature"
    r"|authorization|auth(?!or)|(?<=[?&])sig)\w*"
)
_VALUE = r"(?:(?:Bearer|Basic)\s+)?(?:'[^']*'|\"[^\"]*\"|\[[^\]]*\]|(?:-\s+\S+\s*)+|[^\s,;&'\"]+)"
# api_key=..., "password": "...", token is [...], Authorization: Bearer ...; as options, --data.token ...
_PAIR = re.compile(
    rf"(\b[\w-]*{_WORD}['\"]?(?:\s*[=:]\s*|\s+is\s+(?=['\"\[]))|--[\w.-]*{_WORD}\s+){_VALUE}", re.IGNORECASE
)
_BEARER = re.compile(r"(\bbearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_PEM = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)", re.DOTALL)
# Tokens that are known by their form: Hugging Face, GitHub, GitLab, OpenAI, AWS, Slack, JSON web tokens.
_FORM = re.compile(
    r"\b(?:hf_\w{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}|AKIA[A-Z0-9]{12,}"
    r"|xox[abprs]-[\w-]{10,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)


def is_secret(name: str) -> bool:
    """Whether a name indicates a secret.

    Examples
    --------
    >>> is_secret("WANDB_API_KEY"), is_secret("NCCL_DEBUG")
    (True, False)
    """
    return _NAME.search(name) is not None


def mask_text(text: str) -> str:
    """The text with secrets masked that can be recognised by their form."""
    masked = _LOGIN.sub(f"{MASK}@", _ADDRESS.sub(rf"\1{MASK}@", text))
    for pattern in (_PAIR, _BEARER, _PEM):
        masked = pattern.sub(rf"\1{MASK}", masked)
    return _FORM.sub(MASK, masked)


def one_line(text: str) -> str:
    """The same as one line; line breaks and terminal codes, which a path may hold, are escaped.

    Examples
    --------
    >>> one_line("a\\nb holds no run")
    'a\\\\nb holds no run'
    """
    return mask_text("".join(c if c >= " " and c != "\x7f" else repr(c)[1:-1] for c in text))


def mask_tree(value: Any, name: str = "") -> Any:
    """Settings with secrets masked: strings whose name indicates one, and what :func:`mask_text` finds in others."""
    if isinstance(value, Mapping):
        # What lies under a secret's name is secret, whatever its own name.
        return {key: mask_tree(item, name if is_secret(name) else str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_tree(item, name) for item in value]
    if isinstance(value, str):
        return MASK if is_secret(name) else mask_text(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and _PLAIN_SECRET.search(name):
        return MASK
    return value


class MaskingFormatter(logging.Formatter):
    """Formats log lines, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return mask_text(super().format(record))
