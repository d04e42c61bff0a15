"""S3 addresses, and the settings of the AWS tools, from the environment and their files."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from wsi_mmm.errors import ConfigError
from wsi_mmm.storage.base import redact

Settings = tuple[tuple[str, str], ...]

_ELSEWHERE = ("sso_session", "sso_start_url", "credential_process", "role_arn", "web_identity_token_file")
_KEYS = {  # name in the files of the AWS tools, and in their environment in capitals -> name of obstore
    "aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}  # fmt: skip


def split_uri(uri: str) -> tuple[str, str]:
    """Return ``s3://bucket`` and the key. It may hold '#' and '?': it is everything after the bucket."""
    bucket, _, key = uri.split("://", 1)[1].partition("/")
    return f"s3://{bucket}", key


def find_settings() -> Settings:
    """Return the settings of obstore, sorted, from the environment of this process."""
    return tuple(sorted(s3_settings(os.environ).items()))


def s3_settings(env: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of obstore, from the environment of the AWS tools."""
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or env.get("AWS_ENDPOINT")
    settings = {"region": env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"}
    if endpoint:
        settings["endpoint"] = _check_endpoint(endpoint)
    if any(env.get(name, "").lower() in ("1", "true", "yes") for name in ("AWS_NO_SIGN_REQUEST", "AWS_SKIP_SIGNATURE")):
        return settings | {"skip_signature": "true"}
    if not env.get("AWS_ACCESS_KEY_ID") or env.get("AWS_PROFILE"):
        return settings | _shared_credentials(env)
    # obstore reads them itself, but stores are cached by their settings, and keys may change.
    return settings | {new: env[old.upper()] for old, new in _KEYS.items() if env.get(old.upper())}


def _check_endpoint(address: str) -> str:
    """Return ``address`` if it is one of an http(s) server; ConfigError says what it lacks."""
    parts = urlsplit(address)
    try:
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        whole = False
    if not whole or any(letter.isspace() for letter in address):
        shown = redact(address) if "://" in address else address.rpartition("@")[2]
        raise ConfigError(f"the S3 endpoint {shown!r} is no address; write it as http://HOST:PORT or https://HOST")
    return address


def _shared_credentials(env: Mapping[str, str]) -> dict[str, str]:
    """Return the keys of AWS_PROFILE (default: 'default') in the shared credentials and config files."""
    profile = env.get("AWS_PROFILE") or env.get("AWS_DEFAULT_PROFILE") or "default"
    found = _read_profile(profile, env)
    if env.get("AWS_PROFILE") and not found:
        raise ConfigError(f"AWS_PROFILE={profile} is in no credentials file; run 'aws configure --profile {profile}'")
    elsewhere = next((name for name in _ELSEWHERE if name in found), None)
    if elsewhere and "aws_access_key_id" not in found:
        raise ConfigError(
            f"the AWS profile {profile} takes its keys from elsewhere ({elsewhere}), which is not followed here; "
            f'export them first: eval "$(aws configure export-credentials --profile {profile} --format env)"; '
            "unset AWS_PROFILE"
        )
    names = {**_KEYS, "region": "region", "endpoint_url": "endpoint"}
    if "endpoint_url" in found:
        _check_endpoint(found["endpoint_url"])
    return {new: found[old] for old, new in names.items() if old in found}


def _read_profile(profile: str, env: Mapping[str, str]) -> dict[str, str]:
    home = Path(env.get("HOME") or "~").expanduser() / ".aws"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([env.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials",
                     env.get("AWS_CONFIG_FILE") or home / "config"])  # fmt: skip
    except (configparser.Error, OSError, UnicodeDecodeError):
        # Not chained: the parser's error quotes the line, which may hold a key.
        raise ConfigError("the AWS credentials or config file cannot be read; check its lines") from None
    found: dict[str, str] = {}
    for section in (f"profile {profile}", profile):
        if parser.has_section(section):
            found |= dict(parser.items(section))
    services = f"services {found.get('services')}"
    for line in parser.get(services, "s3", fallback="").splitlines():  # its settings lie one level deeper
        name, equals, value = line.partition("=")
        if equals and name.strip() == "endpoint_url":
            found["endpoint_url"] = value.strip()
    return found
