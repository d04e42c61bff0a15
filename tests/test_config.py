"""Settings files, resolutions and the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsi_mmm import config
from wsi_mmm.errors import ConfigError, OptionError
from wsi_mmm.options import positive_mpp, resolution


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf"), "0", "nan", "fine", ""])
def test_a_resolution_must_be_a_finite_number_above_zero(value: float | str) -> None:
    """Zero, negative, NaN, infinite and non-numbers are refused with the unit in the message."""
    with pytest.raises(OptionError, match="micrometres per pixel"):
        positive_mpp(value)


def test_a_magnification_is_ten_over_mpp() -> None:
    """20x is 0.5 mpp, 40x is 0.25 mpp, and neither leaves the model's own."""
    assert resolution(None, 20) == 0.5
    assert resolution(None, 40) == 0.25
    assert resolution(0.3, None) == 0.3
    assert resolution(None, None) is None


def test_mpp_and_magnification_exclude_each_other() -> None:
    """Two resolutions in one command are refused."""
    with pytest.raises(OptionError, match="not both"):
        resolution(0.5, 20)


@pytest.mark.parametrize("mag", [0, -1, float("nan")])
def test_a_magnification_must_be_possible(mag: float) -> None:
    """Zero, negative and NaN magnifications are refused."""
    with pytest.raises(OptionError, match="magnification"):
        resolution(None, mag)


def test_a_settings_file_is_read(tmp_path: Path) -> None:
    """Options of a TOML file come back under their names."""
    path = tmp_path / "run.toml"
    path.write_text('tile_size = 512\ntissue = "none"\n')
    assert config.read_settings(path, ["tile_size", "tissue", "mpp"]) == {"tile_size": 512, "tissue": "none"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tilesize = 512", "unknown option 'tilesize'; options are mpp, tile_size"),
        ("tile_size = ", "not a readable TOML"),
    ],
)
def test_a_wrong_settings_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    """An unknown option and broken TOML are named, with the options that exist."""
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.read_settings(path, ["tile_size", "mpp"])


def test_a_missing_settings_file_says_so(tmp_path: Path) -> None:
    """The path that is not there is in the message."""
    with pytest.raises(ConfigError, match=r"no settings file at .*none\.toml"):
        config.read_settings(tmp_path / "none.toml", [])


def test_secrets_of_the_environment_are_never_shown() -> None:
    """Keys and tokens show as set; logins inside addresses are cut off."""
    environ = {
        "AWS_ACCESS_KEY_ID": "AKIA123",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_SESSION_TOKEN": "tok",
        "AWS_ENDPOINT_URL": "http://me:pw@store:9000/x",
        "AWS_REGION": "eu-west-1",
        "HOME": "/root",
    }
    shown = config.storage_environment(environ)
    assert shown == {
        "AWS_ACCESS_KEY_ID": "set",
        "AWS_SECRET_ACCESS_KEY": "set",
        "AWS_SESSION_TOKEN": "set",
        "AWS_ENDPOINT_URL": "http://store:9000/x",
        "AWS_REGION": "eu-west-1",
    }


def test_what_is_kept_per_user_lies_in_the_users_cache_folder() -> None:
    """XDG_CACHE_HOME names it; the home folder is left for the machine that works to fill in."""
    assert config.user_cache({"XDG_CACHE_HOME": "/big/cache/"}) == "/big/cache/wsi-mmm"
    assert config.user_cache({"XDG_CACHE_HOME": ""}) == config.user_cache({}) == "~/.cache/wsi-mmm"


def test_the_default_cache_comes_from_one_variable() -> None:
    """WSI_MMM_CACHE names the cache; empty is as good as unset."""
    assert config.default_cache({"WSI_MMM_CACHE": "s3://b/c"}) == "s3://b/c"
    assert config.default_cache({"WSI_MMM_CACHE": ""}) is None


def test_settings_nested_without_end_are_refused(tmp_path: Path) -> None:
    """One line, as for any file that is no TOML."""
    path = tmp_path / "deep.toml"
    path.write_text("a = " + "[" * 100_000)
    with pytest.raises(ConfigError, match="not a readable TOML"):
        config.read_toml(path)
