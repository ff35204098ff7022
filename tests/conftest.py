"""Settings of every test: one torch thread, no network beyond this machine, derandomised hypothesis."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("omni", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("omni")

_connect, _connect_ex = socket.socket.connect, socket.socket.connect_ex


def _check(address: Any) -> None:
    """Allow Unix sockets and loopback; raise for all other addresses, host names included."""
    if not isinstance(address, tuple):
        return
    host = str(address[0])
    try:
        allowed = host in ("localhost", "") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        allowed = False
    if not allowed:
        raise OSError(f"tests have no network: a connection to {address!r} was refused")


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    def connect(self: socket.socket, address: Any) -> None:
        _check(address)
        _connect(self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        _check(address)
        return _connect_ex(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        patch.setattr(socket.socket, "connect_ex", connect_ex)
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Programs that a test runs in this process may set other numbers of threads; the next test starts with one.

    With pytest-xdist two processes of two threads each are far slower on two cores than two of one thread.
    """
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a saved model with random weights: 55,000 parameters, byte tokenizer, exact 4x4 pixel codec."""
    from omni.codecs.pixels import PixelCodec, PixelConfig
    from omni.heads import FlowHeadConfig
    from omni.model import Omni, OmniConfig
    from omni.nn.transformer import TransformerConfig
    from omni.text.bpe import BPETokenizer

    tokenizer = BPETokenizer.train([], 256)
    transformer = TransformerConfig(width=32, depth=2, num_heads=2, num_kv_heads=2, head_dim=16)
    flow = FlowHeadConfig(channels=48, num_frequencies=4)
    model = Omni(OmniConfig(transformer=transformer, flow=flow, vocab_size=tokenizer.vocab_size))
    model.tokenizer, model.codec = tokenizer, PixelCodec(PixelConfig(patch=4))
    directory = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(directory)
    return directory
