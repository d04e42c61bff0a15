"""Weights of the Hub: in the cache, or a line within seconds."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import wsi_mmm
from wsi_mmm.errors import ModelError
from wsi_mmm.model import hub
from wsi_mmm.model.hub import check_hub


@pytest.fixture(autouse=True)
def hub_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A Hub that is asked, without a proxy, with an empty cache; nobody listens there yet."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.mark.parametrize("name", ["resnet18", "vit_small_patch16_224.augreg_in1k", "hf-hub:nobody/vit@main"])
def test_a_hub_that_does_not_answer_is_one_line_that_names_the_ways_out(name: str) -> None:
    """Not two and a half minutes of attempts."""
    begin = time.monotonic()
    with pytest.raises(ModelError) as caught:
        check_hub(name)
    text = str(caught.value)
    assert f"'{name}'" in text and "127.0.0.1 does not answer (" in text and "\n" not in text
    assert "as weights" in text and "HF_HOME" in text and time.monotonic() - begin < 5


def test_embed_says_so_before_any_slide_is_begun(tmp_path: Path) -> None:
    """Once, and not per slide; from Python as on the command line."""
    with pytest.raises(ModelError, match="'resnet18' are not on this machine"):
        wsi_mmm.embed(["a.svs", "b.svs"], "resnet18", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_address_that_drops_everything_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All addresses together have a few seconds."""
    gone = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 80))] * 50
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: gone)
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.2)
    begin = time.monotonic()
    with pytest.raises(ModelError, match="does not answer"):
        check_hub("resnet18")
    assert time.monotonic() - begin < 3


def test_a_name_that_cannot_be_found_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a resolver."""

    def unknown(*args: object, **more: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ModelError, match=r"127\.0\.0\.1 cannot be found \(Name or service not known\)"):
        check_hub("resnet18")


def test_offline_by_wish_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's own variable."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        check_hub("resnet18")


def test_a_hub_that_answers_or_a_cache_that_has_it_is_enough(hub_at: socket.socket, tmp_path: Path) -> None:
    """What is not on the Hub at all is left to timm."""
    check_hub("no-such-network")
    folder = tmp_path / "models--timm--resnet18.a1_in1k" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    check_hub("resnet18")
    hub_at.listen()
    check_hub("resnet34")
