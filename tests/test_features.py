"""What is pooled of images, on disk, and the start of a network from it."""

import datasets
import numpy as np
import pytest
import torch
from protoleak import statistics_protoleak
from protoleak.training.features import in_blocks, new_rows
from protoleak.training.initialisation import begin_as_discriminant
from protoleak.training.views import RandomView

from .conftest import TEXTURE, tiny_model
from .test_train import InMemory


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_rows_on_disk_are_read_as_those_of_a_tensor(cache, monkeypatch):
    values, rows = torch.randn(10, 2, 3), new_rows()
    for batch in values.split(4):
        rows.append(batch)
    assert rows.shape == values.shape
    assert torch.equal(rows[2:7], values[2:7])
    places = torch.tensor([7, 1, 1, 5])
    selected, again = rows[places], rows[places][torch.tensor([2, 0])]
    assert selected.shape == (4, 2, 3)
    assert torch.equal(selected[1:4], values[places][1:4])
    assert torch.equal(again[:], values[[1, 7]])
    monkeypatch.setattr(statistics_protoleak, "BLOCK", 18)
    blocks = list(in_blocks(rows, selected))
    assert [len(block) for block in blocks] == [3, 3, 3, 1, 3, 1]
    assert torch.equal(torch.cat(blocks), torch.cat([values, values[places]]))
    assert not [path for path in cache.rglob("*") if path.is_file()], "nothing is left where a run is killed"


STATISTICS = {"pooling": "statistics"}  # 116 features


@pytest.mark.parametrize(("overrides", "count"), [(STATISTICS, 60), (STATISTICS, 150), (TEXTURE, 30)])
def test_a_network_begins_the_same_however_few_features_are_in_memory(cache, count, overrides, monkeypatch):
    """Of fewer images than features, and of more."""
    rng = torch.Generator().manual_seed(0)
    model, labels = tiny_model(**overrides), torch.arange(count) % 3
    shape = (4, 8, 8)
    if model.takes_features:
        config = model.config
        shape = len(config.scales), len(config.timesteps), sum(model.protoleak.encoder.parts.values())
    inputs = torch.rand(count, *shape, generator=rng) + labels.view(-1, 1, 1, 1) / 4
    data, begun = InMemory(inputs, labels), []
    for block in (statistics_protoleak.BLOCK, 10 * sum(model.protoleak.encoder.parts.values())):
        monkeypatch.setattr(statistics_protoleak, "BLOCK", block)
        model = tiny_model(**overrides)
        begin_as_discriminant(model, RandomView([data]), data)
        kind = "features" if model.takes_features else "latents"
        with torch.no_grad():
            begun.append(model.eval()(**{kind: inputs}).logits.numpy())
    np.testing.assert_allclose(begun[1], begun[0], rtol=1e-3, atol=1e-3 * np.abs(begun[0]).max())
