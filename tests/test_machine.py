"""What machines have set otherwise than the libraries expect."""

from __future__ import annotations

import logging
import os
import pwd
import tempfile
import urllib.request

import pytest

from finercut.system import machine


@pytest.fixture
def work(tmp_path):
    return tmp_path / ".finercut"


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.WARNING, "finercut")


def prepared(work, **variables):
    environment = {"HOME": str(work.parent), "USER": "me"} | variables
    machine.prepare(environment, work)
    return environment


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "intern.example"}, "intern.example,127.0.0.1,localhost,::1"),
        ({"no_proxy": "a, localhost", "NO_PROXY": "b"}, "a,localhost,b,127.0.0.1,::1"),
    ],
)
def test_servers_of_this_machine_are_reached_without_a_proxy(work, monkeypatch, before, after):
    environment = prepared(work, HTTP_PROXY="http://proxy.example:3128", **before)
    assert (environment["no_proxy"], environment["NO_PROXY"]) == (after, after)
    monkeypatch.setenv("no_proxy", environment["no_proxy"])
    assert urllib.request.proxy_bypass("127.0.0.1")
    assert not urllib.request.proxy_bypass("huggingface.co")


def test_who_takes_no_proxy_for_any_host_keeps_it(work):
    assert prepared(work, NO_PROXY="*")["NO_PROXY"] == "*"


@pytest.mark.parametrize(
    ("before", "after"),
    [("", "finercut"), ("other", "other,finercut"), ("other, finercut", "other, finercut")],
)
def test_the_plugin_is_among_those_that_vllm_loads(work, before, after):
    assert prepared(work, VLLM_PLUGINS=before)["VLLM_PLUGINS"] == after
    assert "VLLM_PLUGINS" not in prepared(work)  # vLLM loads all then


def test_a_user_id_without_a_name_gets_one(work, monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert prepared(work, USER="")["USER"] == f"uid{os.getuid()}"
    assert prepared(work, USER="", LOGNAME="ann")["USER"] == ""


def test_a_home_that_cannot_be_written_to_is_replaced(work, caplog):
    environment = prepared(work, HOME="/proc/no/such/home")
    assert environment["HOME"] == str(work / "home")
    assert os.access(environment["HOME"], os.W_OK)
    assert "/proc/no/such/home cannot be written to" in caplog.text
    assert prepared(work)["HOME"] == str(work.parent)


def test_a_folder_too_long_for_sockets_is_not_taken(work, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", tempfile.tempdir)
    long = tmp_path / ("x" * machine.LONGEST_TMPDIR)
    assert prepared(work, TMPDIR=str(long))["TMPDIR"] == "/tmp"
    assert "is too long for the sockets" in caplog.text
    assert prepared(work, TMPDIR="/var/tmp")["TMPDIR"] == "/var/tmp"
