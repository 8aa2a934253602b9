"""The ONNX graph gives what the network gives."""

import json

import numpy as np
import pytest
import torch
from protoleak.cli import main

from .conftest import TEXTURE, fit_random_detector, tiny_model

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(("part", "whitening"), [("whole", True), ("network", False)])
def test_the_graph_gives_the_same_scores(part, whitening, processor, tmp_path):
    model = tiny_model(pooling="statistics", latent_whitening=whitening)
    if whitening:
        model.protoleak.whitening.fit([torch.randn(20, 4, 8, 8) * torch.tensor([1, 2, 3, 4]).view(4, 1, 1)])
    fit_random_detector(model)
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    path = tmp_path / "model.onnx"
    command = ["export", "--model", str(tmp_path / "checkpoint"), "--part", part, "--output", str(path)]
    assert main(command) == 0
    assert main(command) == 2, "nothing is overwritten"
    facts = json.loads((tmp_path / "model.onnx.json").read_text())
    assert facts["labels"] == ["real", "a", "b"]
    session = onnxruntime.InferenceSession(str(path))
    for count in (1, 5):  # the batch size is open
        pixels = torch.rand(count, 3, 32, 32) * 2 - 1
        inputs = pixels if part == "whole" else model.protoleak.encode(pixels)[0]
        assert facts["shape"] == ["batch", *inputs.shape[1:]]
        logits, embeddings, statistics = session.run(None, {facts["input"]: inputs.numpy()})
        with torch.no_grad():
            expected = model(pixels)
        probabilities = torch.from_numpy(logits).softmax(dim=1)
        torch.testing.assert_close(probabilities, expected.logits.softmax(dim=1), atol=1e-4, rtol=0)
        np.testing.assert_allclose(embeddings, expected.embeddings, atol=1e-4)
        np.testing.assert_allclose(statistics, expected.statistics, atol=1e-4)


def test_of_texture_what_comes_after_pooling_is_a_graph(processor, tmp_path, capsys):
    model = tiny_model(**TEXTURE)
    fit_random_detector(model)
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    path = tmp_path / "model.onnx"
    command = ["export", "--model", str(tmp_path / "checkpoint"), "--output", str(path)]
    assert main(command) != 0
    assert "Cholesky" in (told := capsys.readouterr().err)
    assert "--part network" in told
    assert not path.exists()
    assert main([*command, "--part", "network"]) == 0
    facts = json.loads((tmp_path / "model.onnx.json").read_text())
    session = onnxruntime.InferenceSession(str(path))
    assert [output.name for output in session.get_outputs()] == ["logits", "embeddings"]
    for count in (1, 5):
        with torch.no_grad():
            expected = model(torch.rand(count, 3, 32, 32) * 2 - 1)
        assert facts["input"] == "features"
        assert facts["shape"] == ["batch", *expected.features.shape[1:]]
        logits, embeddings = session.run(None, {"features": expected.features.numpy()})
        probabilities = torch.from_numpy(logits).softmax(dim=1)
        torch.testing.assert_close(probabilities, expected.logits.softmax(dim=1), atol=1e-4, rtol=0)
        np.testing.assert_allclose(embeddings, expected.embeddings, atol=1e-4)
