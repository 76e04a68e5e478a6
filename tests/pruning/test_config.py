"""Pruning configs: the shipped files, published files, and everything that is refused."""

import json
from pathlib import Path

import pytest

from pruning.config import PUBLISHED_GROUPS, ConfigError, PruningConfig, load_config

SHIPPED = Path(__file__).parents[2] / "pruning_configs"


@pytest.mark.parametrize(
    ("name", "criterion", "momentum"),
    [
        ("m2_m0", "magnitude", 0),
        ("m22_m0", "taylor_elementwise", 0),
        ("m23_m0", "taylor_sq", 0),
        ("m23_m05", "taylor_sq", 0.5),
        ("m23_m09", "taylor_sq", 0.9),
    ],
)
def test_shipped_configs_mean_what_their_names_say(name, criterion, momentum):
    config, dead = load_config(SHIPPED / f"group8_{name}.json")
    assert config == PruningConfig(criterion, momentum, PUBLISHED_GROUPS) and not dead


def test_a_published_file_keeps_its_meaning_and_names_its_dead_keys(tmp_path):
    path = tmp_path / "published.json"
    path.write_text(json.dumps(dict(method=22, pruning_momentum=0.5, group_size=2, use_momentum=False, frequency=30)))
    config, dead = load_config(path)
    assert config == PruningConfig("taylor_elementwise", 0.5, PUBLISHED_GROUPS)
    assert dead == ["frequency", "group_size", "use_momentum"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[]", "object"),
        ('{"method": 7}', "method 7"),
        ('{"method": 23, "typo": 1}', "typo"),
        ('{"criterion": "tailor"}', "tailor"),
        ('{"momentum": 1}', "momentum"),
        ('{"momentum": true}', "momentum"),
        ('{"group_size": {"embed": 16}}', "exactly the axes"),
        ('{"moment": 0.9}', "known"),
        ('{"group_size": {"embed": 0, "heads": 1, "qk": 1, "v": 1, "mlp": 1}}', "embed"),
    ],
)
def test_what_is_refused_names_the_file_and_the_fault(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json"):
        load_config(tmp_path / "none.json")


def test_the_default_is_found_from_any_folder(tmp_path, monkeypatch):
    """Scripts are started from other folders too; a file that is there comes first."""
    name = "pruning_configs/group8_m23_m09.json"
    here = load_config(name)
    monkeypatch.chdir(tmp_path)
    assert load_config(name) == here
    (tmp_path / "pruning_configs").mkdir()
    (tmp_path / name).write_text('{"criterion": "magnitude"}')
    assert load_config(name)[0].criterion == "magnitude"
