"""Keeps credentials out of what people and servers are shown."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

_NAMES = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_?KEY|CREDENTIAL|AUTH|WEBHOOK", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/\s'\"?#]*@")
_QUERY = re.compile(r"([?&][\w.-]*(?:token|password|secret|key|signature|credential)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE)
# As the Hugging Face hub and AWS give them.
_TOKENS = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b")
# Shorter values are words that would be blotted out everywhere.
_SHORTEST = 6
MASK = "***"


def redacted(text: str) -> str:
    """`text` without the passwords, tokens and keys that this process was given, and without any user in a URI."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return _TOKENS.sub(MASK, _QUERY.sub(rf"\1{MASK}", _USER_INFO.sub("", text)))


def _secrets() -> set[str]:
    found = set()
    for name, value in os.environ.items():
        if _NAMES.search(name):
            found.add(value)
        if "://" in value:
            found.update(_in_uri(value))
    return {secret for secret in found if len(secret) >= _SHORTEST}


def _in_uri(uri: str) -> Iterator[str]:
    try:
        parts = urlsplit(uri)
        password = parts.password
    except ValueError:
        return
    if password:
        yield from (password, unquote(password))
    yield from (value for name, value in parse_qsl(parts.query) if _NAMES.search(name))


def install() -> None:
    """Make every log record of this process pass through `redacted`, with its traceback."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        message = record.getMessage()
        if (clean := redacted(message)) != message:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[0] is not None:
            # Formatters take this text where it is there.
            record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
        return record

    make_redacted.redacts = True
    logging.setLogRecordFactory(make_redacted)
