import pytest
from protoleak import ProtoLeakConfig

from .conftest import tiny_config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timesteps", []),
        ("timesteps", [0, 0]),
        ("timesteps", [1000]),
        ("timesteps", [-1]),
        ("timesteps", [0.5]),
        ("embedding_size", 0),
        ("latent_channels", 0),
        ("num_prototypes", 0),
        ("temperature_range", [5.0, 0.5]),
        ("time_dropout", 1.0),
        ("feature_dropout", -0.1),
        ("attention_entropy_weight", -1),
        ("alpha", 0),
        ("alpha", 1),
        ("beta_start", 0.0),
        ("beta_end", 1.0),
        ("beta_schedule", "cubic"),
        ("pooling", "max"),
        ("open_set_scores", {}),
        ("open_set_scores", {"pixels": "kde"}),
        ("open_set_scores", {"embeddings": "svm"}),
        ("open_set_scores", {"embeddings": "knn"}),
        ("noise_seed", -1),
    ],
)
def test_wrong_values_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        ProtoLeakConfig(**{field: value})


def test_a_config_survives_saving(tmp_path):
    config = tiny_config(alpha=0.01, pooling="statistics", timesteps=(0, 7))
    config.save_pretrained(tmp_path)
    assert ProtoLeakConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_the_backbone_takes_the_latent_channels():
    assert ProtoLeakConfig(latent_channels=16).backbone_config.num_channels == 16


def test_keep_resolution_needs_a_resnet():
    with pytest.raises(ValueError, match="keep_resolution"):
        ProtoLeakConfig(backbone_config={"model_type": "convnext", "patch_size": 1}, keep_resolution=True)
