import pytest

from app.errors import ConfigurationError
from app.runtime.ray_layout import RayLayout, Replicas, parse_replicas
from app.settings import load_settings


@pytest.mark.parametrize(("text", "expected"), [("1", Replicas(1, 1)), (" 2-8 ", Replicas(2, 8))])
def test_replicas_are_a_number_or_a_range(text, expected):
    assert parse_replicas(text) == expected
    assert str(expected) == text.strip()


@pytest.mark.parametrize("text", ["0", "8-2", "-1", "many", "1-", "1.5", ""])
def test_other_text_is_not_a_number_of_replicas(text):
    with pytest.raises(ConfigurationError, match=r"DEIXIS_RAY_LAYOUT\.encoders: .* not a number of replicas"):
        load_settings(ray_layout=f"encoders={text}")


@pytest.mark.parametrize(
    "value",
    ["edges=2, encoders=1-8,encoder_gpus=0.5", {"edges": 2, "encoders": "1-8", "encoder_gpus": 0.5}],
)
def test_a_layout_is_text_or_a_mapping(value):
    layout = load_settings(ray_layout=value).ray_layout
    assert layout == RayLayout(edges=Replicas(2, 2), encoders=Replicas(1, 8), encoder_gpus=0.5)
    assert str(layout) == "edges=2,encoders=1-8,encoder_gpus=0.5"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("edges", "'edges' is not name=value"),
        ("edges=1,edges=2", "'edges=2' repeats a field"),
        ("egdes=2", "unknown field 'egdes'; known: edges, "),
        ("shards=1001", "less than or equal to 1000"),
        ("encoder_cpus=0", "greater than 0"),
        ("models_per_encoder=0", "greater than or equal to 1"),
    ],
)
def test_an_invalid_layout_is_rejected(text, problem):
    with pytest.raises(ConfigurationError, match=problem):
        load_settings(ray_layout=text)


def test_a_mapping_with_an_unknown_field_is_rejected():
    with pytest.raises(ConfigurationError, match=r"DEIXIS_RAY_LAYOUT.*unknown field 'egdes'; known: edges"):
        load_settings(ray_layout={"egdes": 2})
