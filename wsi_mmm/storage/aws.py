"""S3 addresses, and the settings of the AWS tools, from the environment and their files."""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from wsi_mmm.errors import ConfigError, StorageError
from wsi_mmm.storage.base import redact

Settings = tuple[tuple[str, str], ...]

_ELSEWHERE = ("sso_session", "sso_start_url", "credential_process", "role_arn", "web_identity_token_file")
_KEYS = {  # name in the files of the AWS tools, and in their environment in capitals -> name of obstore
    "aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}  # fmt: skip


_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
_ADDRESS = re.compile(r"https?://([^/?#@\s]*@)?([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?(/[!$-;=@-Z_a-z~]*)?")


def split_uri(uri: str) -> tuple[str, str]:
    """Return ``s3://bucket`` and the key. It may hold '#' and '?': it is everything after the bucket. StorageError."""
    bucket, _, key = uri.split("://", 1)[1].partition("/")
    if not _BUCKET.fullmatch(bucket):  # the library panics at some
        raise StorageError(f"{redact(uri)}: this is no name of a bucket; write it as s3://BUCKET/KEY")
    return f"s3://{bucket}", key


def find_settings() -> Settings:
    """Return the settings of obstore, sorted, from the environment of this process."""
    return tuple(sorted(s3_settings(os.environ).items()))


def s3_settings(env: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of obstore, from the environment of the AWS tools, which counts more than their files.

    obstore reads the environment, too, but stores are cached by their settings, and it takes what is empty or ends in
    a line break as it is. Raises ConfigError for values that no request can hold, without showing a key.
    """
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or env.get("AWS_ENDPOINT")
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
    given = {name: value for name, value in (("endpoint", endpoint), ("region", region)) if value}
    if any(env.get(name, "").lower() in ("1", "true", "yes") for name in ("AWS_NO_SIGN_REQUEST", "AWS_SKIP_SIGNATURE")):
        given |= {"skip_signature": "true"}
    elif not env.get("AWS_ACCESS_KEY_ID") or env.get("AWS_PROFILE"):
        given = _shared_credentials(env) | given
    else:
        given |= {new: env[old.upper()].strip() for old, new in _KEYS.items() if env.get(old.upper())}
    settings = {"region": "us-east-1", **given}
    if "endpoint" in settings:
        settings["endpoint"] = _check_endpoint(settings["endpoint"])
    elif any(env.get(name) == "" for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")):
        settings["endpoint"] = f"https://s3.{settings['region']}.amazonaws.com"
    for name, value in settings.items():
        if not re.fullmatch("[!-~]+", value) or (name == "region" and not re.fullmatch("[A-Za-z0-9-]+", value)):
            raise ConfigError(f"AWS_{name.upper()} holds letters that are not allowed there; set it again")
    return settings


def _check_endpoint(address: str) -> str:
    """Return ``address`` if it is one of an http(s) server, its scheme in small letters; else ConfigError."""
    scheme, _, rest = address.partition("://")
    lower = f"{scheme.lower()}://{rest}"
    found = _ADDRESS.fullmatch(lower)
    whole = found is not None and int((found[3] or ":443")[1:]) in range(1, 1 << 16) and _is_host(found[2])
    if not whole:
        shown = redact(address) if "://" in address else address.rpartition("@")[2]
        raise ConfigError(f"the S3 endpoint {shown!r} is no address; write it as http://HOST:PORT or https://HOST")
    return lower


def _is_host(host: str) -> bool:
    """Tell whether ``host`` can be one: what ends in a number, or stands in brackets, has to be an IP address."""
    if re.search("[A-Za-z]", host.rpartition(".")[2]) and not host.startswith("["):
        return True
    with suppress(ValueError):
        ip_address(host.strip("[]"))
        return True
    return False


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
