"""Masks credentials in log records, error messages and tags."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Set
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

# What the name of a credential ends with: MAX_TOKENS, TOKENIZER_NAME, SSH_AUTH_SOCK and GIT_AUTHOR_NAME are none. A
# model's special tokens, such as EOS_TOKEN, and a figure for each token are none either.
_NAMES = re.compile(
    r"""(?:
        (?<!BOS_)(?<!EOS_)(?<!PAD_)(?<!UNK_)(?<!SEP_)(?<!CLS_)(?<!MASK_)(?<!STOP_)(?<!SPECIAL_)(?<!PER_)TOKEN
        | PASSWORD | PASSWD | PASSPHRASE | SECRETS? | API[_-]?KEYS? | JWT | AUTHORIZATION | COOKIE
        | (?:AUTH|CONNECTION)[_-](?:STRING|HEADERS?)
        | (?:ACCESS|ACCOUNT|AUTH|DEPLOY|ENCRYPTION|FERNET|MASTER|PRIVATE|SECRET|SIGNING|STORAGE)
          [_-]?KEY(?:_?(?:ID|BASE))?
        | (?:^|[_-])(?:PASS|PAT|AUTH|CREDENTIALS?|WEBHOOK(?:_UR[IL])?)
        | [_-]PWD
    )(?:_?\d+)?$""",
    re.IGNORECASE | re.VERBOSE,
)
_QUERY_NAMES = re.compile(r"(?:^|[_.-])(?:key|sig|signature|credential)$", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/\s'\"?#]*@")
_PASSWORD = re.compile(r"://[^/\s'\"?#:@]*:[^/\s'\"?#]+@")
_QUERY = re.compile(r"([?&]([\w.-]+)=)[^&\s'\"]+")
_ASSIGNED = re.compile(r"(\b([\w-]+)['\"]?\s*[=:]\s*['\"]?)([^\s'\",;&}]+)")
# As Hugging Face, AWS, GitHub, GitLab, Slack, Google, OpenAI and their likes give them.
_SHAPES = re.compile(
    r"""(?<![A-Za-z0-9_-])(?:
        hf_[A-Za-z0-9]{20,} | (?:AKIA|ASIA)[A-Z0-9]{16} | gh[pousr]_[A-Za-z0-9]{30,} | github_pat_\w{30,}
        | glpat-[\w-]{20,} | xox[abeoprs]-[A-Za-z0-9-]{10,} | AIza[\w-]{35} | sk-(?:proj-|ant-|or-)?\w{20,}
        | eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+
    )|(?<=https://hooks\.slack\.com/services/)[\w/]+ | -----BEGIN\ [A-Z\ ]*PRIVATE\ KEY-----""",
    re.VERBOSE,
)
# Shorter values would mask parts of ordinary words.
_SHORTEST = 6
_WORD = re.compile(r"[A-Z]?[a-z]{1,11}|[A-Z]{1,12}")
_NUMBER = re.compile(r"[-+.\d_]+(?:[eE][-+]?\d+)?")
_PATH = re.compile(r"~?\.{0,2}/.*\.[A-Za-z]\w{0,4}")
# What people put where no credential is needed, and words of the project's own log lines. As credentials, they and
# numbers and paths are masked only beside a credential's name.
_ORDINARY = re.compile(
    r"""changeme | default | disabled | dummy | empty | enabled | example | false | minioadmin | none | not-needed
    | null | password | secret | true
    | attention | calibrate | checkpoint | evaluate | fetch | finercut | mlflow | model | parameters | pipelines
    | postgres | postgresql | prefect | promote | pruned? | register | search | sublayers? | throughput | trajectory
    | version | whole""",
    re.IGNORECASE | re.VERBOSE,
)
MASK = "***"


def redacted(text: str) -> str:
    """`text` without the credentials in this process's environment, known shapes of tokens, and users in URIs."""
    beside_names = set()
    for secret in sorted({value for _, value in _credentials()}, key=len, reverse=True):
        if _is_ordinary(secret):
            beside_names.add(secret)
        elif _WORD.fullmatch(secret):
            text = re.sub(rf"(?<![A-Za-z0-9_]){secret}(?![A-Za-z0-9_])", MASK, text)
        else:
            text = text.replace(secret, MASK)
    text = _QUERY.sub(_masked_query, _USER_INFO.sub("", text))
    if beside_names:
        text = _ASSIGNED.sub(partial(_masked_value, beside_names), text)
    return _SHAPES.sub(MASK, text)


def contains_token(text: str) -> bool:
    """Whether a part of `text` has the shape of a token of a well-known service."""
    return _SHAPES.search(text) is not None


def contains_password(text: str) -> bool:
    """Whether a URI in `text` has a password, or a credential in its query."""
    return _PASSWORD.search(text) is not None or _QUERY.sub(_masked_query, text) != text


def variable_holding(value: str) -> str | None:
    """The environment variable whose credential `value` is; words and numbers are no evidence of that."""
    if _is_ordinary(value) or _WORD.fullmatch(value):
        return None
    return next((name for name, secret in _credentials() if secret == value), None)


def _credentials() -> Iterator[tuple[str, str]]:
    """Each with the environment variable that it is in."""
    for name, value in os.environ.items():
        found = [value] if _NAMES.search(name) else []
        if "://" in value:
            found += _in_uri(value)
        yield from ((name, secret) for secret in found if len(secret) >= _SHORTEST)


def _in_uri(uri: str) -> Iterator[str]:
    try:
        parts = urlsplit(uri)
        password = parts.password
    except ValueError:
        return
    if password:
        yield from (password, unquote(password))
    yield from (value for name, value in parse_qsl(parts.query) if _in_query(name))


def _in_query(name: str) -> bool:
    return _NAMES.search(name) is not None or _QUERY_NAMES.search(name) is not None


def _is_ordinary(value: str) -> bool:
    if _ORDINARY.fullmatch(value) or _NUMBER.fullmatch(value):
        return True
    return _PATH.fullmatch(value) is not None or ("/" in value and os.path.exists(value))


def _masked_query(found: re.Match[str]) -> str:
    return f"{found[1]}{MASK}" if _in_query(found[2]) else found[0]


def _masked_value(secrets: Set[str], found: re.Match[str]) -> str:
    return f"{found[1]}{MASK}" if found[3] in secrets and _NAMES.search(found[2]) else found[0]


def install() -> None:
    """Make every log record of this process pass through `redacted`, with its traceback."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # a library's arguments do not fit its format
            message = record.msg = f"{record.msg} {record.args}"
            record.args = ()
        if (clean := redacted(message)) != message:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[0] is not None:
            # Formatters take this text where it is there.
            record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
        return record

    make_redacted.redacts = True
    logging.setLogRecordFactory(make_redacted)
