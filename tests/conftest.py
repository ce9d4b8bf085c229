"""What holds for every test: no network, one thread, the same seed."""

import logging
import os
import random
import signal
import socket
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "MPLBACKEND": "Agg"}  # libraries read them when imported

import numpy as np
import pytest
import torch

LONGEST = ("test_contrastive_triton.py", "test_validate.py", "test_grid.py", "test_export.py", "test_interruptions.py")
LOOPBACK = ("127.0.0.1", "::1", "localhost", "", None)


def pytest_collection_modifyitems(items):
    """The files that take a minute or more come first, so that no process waits for one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _hears_ctrl_c():
    """Also where a shell runs the tests in its background, and has them ignore it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _levels():
    """The command line lets the zoo speak up; no test hears what an earlier one asked for."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("zoo").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _no_network():
    """Whatever reaches beyond this machine fails, with a sentence, instead of passing where there is a network."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self, address):
        _refuse(address[0] if isinstance(address, tuple) else None)  # a Unix socket's address is a path
        return connect(self, address)

    def guarded_resolve(host, *arguments, **keywords):
        _refuse(host)
        return resolve(host, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_resolve)
        yield


def _refuse(host):
    if host not in LOOPBACK:
        raise RuntimeError(f"a test reached for the network: {host!r}")


@pytest.fixture
def own_registry():
    """What a test registers is gone after it; what the zoo's own files registered meanwhile stays, as their import does."""
    from zoo import registry

    yield
    for key, known in list(registry._known.entries.items()):
        if not known.maker.__module__.startswith("zoo."):
            del registry._known.entries[key]


@pytest.fixture
def command(monkeypatch, capsys):
    """Call ``zoo`` with arguments, as the console script does: exit code, standard output, standard error."""
    from zoo import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return stop.value.code, out, err

    return call
