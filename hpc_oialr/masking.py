"""Keep secrets out of what a run writes down: passwords in addresses, tokens, keys."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_NAME = re.compile(r"TOKEN|KEY|PASSW|SECRET|CREDENTIAL|JWT|AUTH", re.IGNORECASE)
# Names of numbers that are secrets too, which max_tokens is not.
_PLAIN_SECRET = re.compile(r"PASSW|SECRET|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
# https://user:password@host; a path of it has one slash
_ADDRESS = re.compile(r"(\b[a-z][\w+.-]*:/{1,2})[^/\s@'\"]+@", re.IGNORECASE)
# api_key=..., "password": "...", Authorization: Bearer ...
_PAIR = re.compile(
    r"(\b[\w-]*(?:token|api[_-]?key|access[_-]?key|passw(?:or)?d|secret|authorization)\w*['\"]?(?:\s*[=:]\s*|\s+is\s+(?=['\"])))"
    r"(?:Bearer\s+)?(?:'[^']*'|\"[^\"]*\"|[^\s,;&'\"]+)",
    re.IGNORECASE,
)
# Tokens that are known by their form: Hugging Face, GitHub, GitLab, OpenAI, AWS, JSON web tokens.
_FORM = re.compile(
    r"\b(?:hf_\w{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}|AKIA[A-Z0-9]{12,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)


def is_secret(name: str) -> bool:
    """Whether a name hints at a secret.

    Examples
    --------
    >>> is_secret("WANDB_API_KEY"), is_secret("NCCL_DEBUG")
    (True, False)
    """
    return _NAME.search(name) is not None


def mask_text(text: str) -> str:
    """A text without the secrets that can be told by their form.

    Examples
    --------
    >>> mask_text("https://me:pw@host/data?token=abc&part=1")
    'https://***@host/data?token=***&part=1'
    >>> mask_text("the key of the layer: 3 tokens")
    'the key of the layer: 3 tokens'
    >>> mask_text("data.token is 'abc' (from the command line); must be int.")
    'data.token is *** (from the command line); must be int.'
    """
    masked = _ADDRESS.sub(rf"\1{MASK}@", text)
    return _FORM.sub(MASK, _PAIR.sub(rf"\1{MASK}", masked))


def mask_tree(value: Any, name: str = "") -> Any:
    """Settings without secrets: strings whose name hints at one, and what :func:`mask_text` finds in the others.

    Examples
    --------
    >>> mask_tree({"data": {"path": "s3://me:pw@host", "api_key": "abc"}, "steps": 3})
    {'data': {'path': 's3://***@host', 'api_key': '***'}, 'steps': 3}
    """
    if isinstance(value, Mapping):
        return {key: mask_tree(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_tree(item, name) for item in value]
    if isinstance(value, str):
        return MASK if is_secret(name) else mask_text(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and _PLAIN_SECRET.search(name):
        return MASK
    return value


class MaskingFormatter(logging.Formatter):
    """A log's lines, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return mask_text(super().format(record))
