"""Every registered encoder takes its published file completely, and gives the vector of its authors' own call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.published_encoders import (
    CALLS,
    COUNTS,
    NETWORKS,
    PAGE,
    encoder_table,
    network_tensors,
    published_tensors,
    small_arguments,
    small_reference,
    table_in,
)
from wsi_mmm.model.checkpoint import open_encoder
from wsi_mmm.model.choose import unread_encoder
from wsi_mmm.model.key_maps import rename_tensors
from wsi_mmm.model.registry import encoder_entries

NAMES = list(encoder_entries())
PIXELS = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def test_every_entry_has_a_reference() -> None:
    """None is left out of the tests below."""
    assert set(CALLS) | set(NETWORKS) == set(NAMES)
    assert not set(CALLS) & set(NETWORKS)


@pytest.mark.parametrize("name", NAMES)
def test_the_published_file_fits_completely(name: str) -> None:
    """At full depth, on the meta device: names and shapes of the published network are those of ours."""
    published = published_tensors(name)
    assert len(published) == COUNTS.get(name, len(published))
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape in published.items()}
    renamed = rename_tensors(tensors, encoder_entries()[name].recipe.key_map, network_tensors(name))
    assert {key: tuple(value.shape) for key, value in renamed.items()} == network_tensors(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_vector_is_that_of_the_published_call(name: str, tmp_path: Path) -> None:
    """From a file under the published names and from pixels of 0 to 255: 1e-5 relative in float32."""
    entry = encoder_entries()[name]
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (entry.recipe.mean, entry.recipe.std))
    x = (PIXELS.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        state, want = small_reference(name, x)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    recipe = entry.recipe.model_copy(update={"arguments": small_arguments(entry), "dimension": 0})
    model = open_encoder(unread_encoder(recipe, tmp_path / "model.safetensors", None))
    with torch.inference_mode():
        found = model.trunk(model.prepare(PIXELS), ())["vector"]
    assert found.shape == want.shape
    assert float((found - want).abs().max() / want.abs().max()) < 1e-5


def test_the_table_of_the_docs() -> None:
    """``PYTHONPATH=tests python -m helpers.published_encoders`` writes it anew."""
    assert table_in(PAGE.read_text(encoding="utf-8")) == encoder_table()
