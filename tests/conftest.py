"""Shared by all tests: one thread each, no network, a cache of their own, and small corpora."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch
from tiny import make_text

hypothesis.settings.register_profile("minigpt", deadline=None, derandomize=True, max_examples=100)
hypothesis.settings.load_profile("minigpt")
torch.set_num_threads(1)


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:   # as a shell starts what is to run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:   # as nohup does
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tokenizers and shards are cached for this test session only."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A single file of about 60 kB."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(make_text(1500), "utf-8")
    return path
