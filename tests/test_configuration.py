import pytest
from protoleak import ProtoLeakConfig, ProtoLeakForImageAttribution

from .conftest import TEXTURE, tiny_config


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
        ("scales", []),
        ("scales", [1, 1]),
        ("scales", [0]),
        ("scales", [9]),
        ("scales", [1, 2]),  # not with pooling="mean"
        ("patch_size", 0),
        ("camera_alpha", 0),
        ("scope", {"trained_on": 3}),
        ("scope", {"trained_on": "\x1b[2Jwild"}),
        ("scope", {"sizes": [64]}),
        ("scope", {"limits": "none"}),
        ("scope", {"anything": "else"}),
    ],
)
def test_wrong_values_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        ProtoLeakConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latent_whitening", False),
        ("texture_families", []),
        ("texture_families", ["cooccurrences", "cooccurrences"]),
        ("texture_families", [["cooccurrences"]]),
        ("texture_families", "cooccurrences"),
        ("patch_size", 3),  # 12 channels are no planes of nine places
        ("open_set_scores", {"statistics": "kde"}),
        ("embedding_size", 1),  # of two families
    ],
)
def test_what_texture_needs_is_named(field, value):
    ProtoLeakConfig(**TEXTURE)
    with pytest.raises(ValueError, match=field):
        ProtoLeakConfig(**TEXTURE | {field: value})


@pytest.mark.parametrize("overrides", [{"pooling": "statistics", "timesteps": (0, 7)}, TEXTURE])
def test_a_config_survives_saving(overrides, tmp_path):
    config = tiny_config(alpha=0.01, **overrides)
    config.save_pretrained(tmp_path)
    assert ProtoLeakConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


SCOPE = {
    "trained_on": "wild",
    "kind": "crops of photographs",
    "images": 2497,
    "sources": 42,
    "formats": ["JPEG", "PNG"],
    "sizes": [64, 256],
    "limits": ["no image can be called unknown"],
}


@pytest.mark.parametrize(
    ("scope", "words"),
    [
        (
            SCOPE,
            "valid for images like the 2,497 that it was trained on (wild; crops of photographs; 42 sources; "
            "JPEG and PNG; sides of 64 to 256 pixels); of others its error rates are not known. "
            "no image can be called unknown",
        ),
        (
            {"sources": 1, "sizes": [256, 256]},
            "valid for images like those that it was trained on (1 source; 256 x 256 pixels); of others its "
            "error rates are not known",
        ),
        (None, None),
    ],
)
def test_a_scope_is_saved_and_said_in_words(scope, words, tmp_path):
    tiny_config(scope=scope).save_pretrained(tmp_path)
    assert ProtoLeakConfig.from_pretrained(tmp_path).scope_title == words


def test_the_backbone_takes_the_latent_channels():
    assert ProtoLeakConfig(latent_channels=16).backbone_config.num_channels == 16


def test_keep_resolution_needs_a_resnet():
    with pytest.raises(ValueError, match="keep_resolution"):
        ProtoLeakConfig(backbone_config={"model_type": "convnext", "patch_size": 1}, keep_resolution=True)


def test_classes_may_be_numbered_by_strings(checkpoint):
    """As the tutorial of transformers builds its maps."""
    id2label, label2id = {"0": "real", "1": "a", "2": "b"}, {"real": "0", "a": "1", "b": "2"}
    model = ProtoLeakForImageAttribution.from_pretrained(checkpoint, id2label=id2label, label2id=label2id)
    for config in (model.config, tiny_config(id2label=id2label, label2id=label2id)):
        assert config.label_names == ["real", "a", "b"]
        assert config.label2id == {"real": 0, "a": 1, "b": 2}
    other = ProtoLeakConfig.from_pretrained(checkpoint, id2label={0: "x", 1: "real"})
    assert other.label2id == {"x": 0, "real": 1}, "not those of before"
    with pytest.raises(ValueError, match=r"must name classes 0\.\.1; got those of \[1, 2\]"):
        tiny_config(id2label={1: "a", 2: "b"})
