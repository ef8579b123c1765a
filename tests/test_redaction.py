"""No secret in what a run writes."""

from __future__ import annotations

import logging

import pytest
from support.tiny_runs import write_recipe

from hpc_oialr.cli.main import main
from hpc_oialr.redaction import MaskingFormatter, mask_text, mask_tree

# Put together here, so that no scanner takes them for real ones.
TOKENS = ["hf_" + "a1" * 10, "ghp_" + "a1" * 10, "glpat-" + "a1" * 10, "sk-" + "a1" * 10, "AKIA" + "A1" * 8]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pw@host/data?token=abc&part=1", "https://***@host/data?token=***&part=1"),
        ("the key of the layer: 3 tokens", "the key of the layer: 3 tokens"),
        ("data.token is 'abc' (from a.yaml); must be int.", "data.token is *** (from a.yaml); must be int."),
        ("ssh://me:pw@host:22/x and http://a@b", "ssh://***@host:22/x and http://***@b"),
        ("password = 'a b' and more", "password = *** and more"),
        ('{"api_key": "abc", "n": 1}', '{"api_key": ***, "n": 1}'),
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ("HF_TOKEN=abc", "HF_TOKEN=***"),
        ("12 tokens/s, key 3, mail me@host, a/b://c", "12 tokens/s, key 3, mail me@host, a/b://c"),
        ("passphrase=a pwd: b", "passphrase=*** pwd: ***"),
        ("--data.token abc --train.steps 3", "--data.token *** --train.steps 3"),
        ("https://me:p@w@host/x?sig=ab&n=1", "https://***@host/x?sig=***&n=1"),
        ("Authorization: Basic YWJj\nbearer abcdefgh.ij", "Authorization: ***\nbearer ***"),
        ("{'tokens': ['a', 'b'], 'n': 1}", "{'tokens': ***, 'n': 1}"),
        ("token:\n  - a\n  - b\nn: 1", "token:\n  ***n: 1"),
        ("private_key=a AccountKey=b==;c", "private_key=*** AccountKey=***;c"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END", "-----BEGIN RSA PRIVATE KEY-----***-----END"),
        (
            "me:pw@host.org:22, B:USR2@60 git@host:x name:tag@sha256:a",
            "***@host.org:22, B:USR2@60 git@host:x name:tag@sha256:a",
        ),
        ("the author: me, --author me", "the author: me, --author me"),
        *((f"found {token}.", "found ***.") for token in TOKENS),
    ],
)
def test_texts(text: str, masked: str) -> None:
    assert mask_text(text) == masked


def test_what_lies_under_a_secret_name() -> None:
    tree = {"auth": {"user": "me", "parts": [{"a": "b"}], "n": 1}, "passphrase": "x", "path": "y"}
    masked = {"auth": {"user": "***", "parts": [{"a": "***"}], "n": 1}, "passphrase": "***", "path": "y"}
    assert mask_tree(tree) == masked
    tree = {"data": {"path": "s3://me:pw@host", "api_key": "abc"}, "steps": 3}
    assert mask_tree(tree) == {"data": {"path": "s3://***@host", "api_key": "***"}, "steps": 3}
    secret = {"pass": "a", "db_pass": "a", "sas": "a", "session_id": "a", "pin": "a", "dsn": "a"}
    assert set(mask_tree(secret).values()) == {"***"}
    plain = {"I_MPI_PIN": "on", "pin_memory": "a", "passes": "a", "bypass_cache": "a"}
    assert mask_tree(plain) == plain


def test_logs_and_their_tracebacks() -> None:
    try:
        raise OSError("cannot reach https://me:s3cret@host")
    except OSError as error:
        info = (OSError, error, error.__traceback__)
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "password=%s", ("s3cret",), info)
    said = MaskingFormatter("%(message)s").format(record)
    assert said.startswith("password=***\nTraceback")
    assert "s3cret" not in said


def test_messages(tmp_path, capsys) -> None:
    recipe = write_recipe(tmp_path)
    assert main(["train", str(recipe), "--data.path", "https://me:s3cret@host/text", "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert "s3cret" not in said
    assert "https:/" in said
