"""Settings of the environment for a bucket: variables, and for S3 a profile of ~/.aws as well.

No message, repr or pickle here holds a value of a setting, only names.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from actstore.errors import BadInput, nearest

PREFIX = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}  # how the names of variables begin that obstore reads
ENDPOINTS = {  # variables that name another server, the first that is set counts
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
TO_SET = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, which go together, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
SERVER = re.compile(r"https?://[^\s/?#]+[^\s]*", re.IGNORECASE)
KEYS = {  # of a profile, and obstore's names for them
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}
FOREIGN = re.compile(
    r"sso_|credential_process|role_arn|source_profile|credential_source|login_session"
)  # keys that AWS's own tools fetch
WEB_IDENTITY = "AWS_WEB_IDENTITY_TOKEN_FILE"
OWN = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", WEB_IDENTITY)  # they come before a profile
CONTAINER = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
METADATA = "http://169.254.169.254"  # of a machine of Amazon's, whose keys obstore asks for if there are no others
METADATA_SECONDS = 2.0  # a machine of Amazon's is answered in milliseconds; elsewhere obstore would wait for minutes


class Settings(dict[str, str]):
    """Settings by their names for obstore; a repr or pickle shows names only."""

    def __repr__(self) -> str:
        return f"Settings({', '.join(self)})"

    def __reduce__(self) -> str:
        raise TypeError("settings are not pickled, since they may hold credentials")


def fingerprint(scheme: str) -> str:
    """A hash that changes when the variables or the profiles' files do."""
    parts = [item for item in sorted(os.environ.items()) if item[0].startswith(PREFIX[scheme])]
    files = [(str(path), _changed(path)) for path in _files()] if scheme == "s3" else []
    return hashlib.blake2b(repr((parts, files)).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def endpoint(scheme: str) -> str:
    """The server's address, if the environment or a profile names one; "" for the cloud's own."""
    named = next((os.environ[name] for name in ENDPOINTS[scheme] if os.environ.get(name)), "")
    return named or of_profile().get("endpoint", "") if scheme == "s3" else named


def check(scheme: str) -> None:
    """Check the settings for what obstore would end in a panic of Rust.

    Raises:
        BadInput: a setting holds a control character, or a server's address is none.
    """
    of_variables = (item for item in os.environ.items() if item[0].startswith(PREFIX[scheme]))
    of_a_profile = of_profile() if scheme == "s3" else Settings()
    broken = [name for name, value in (*of_variables, *of_a_profile.items()) if not value.isprintable()]
    if broken:
        raise BadInput(
            f"the setting {broken[0]} holds a line break or another control character; set it again without it"
        )
    if not _is_server(endpoint(scheme) or "https://cloud"):  # in no variable, which a traceback may show
        named = next((name for name in ENDPOINTS[scheme] if os.environ.get(name)), "endpoint_url")
        raise BadInput(f"the setting {named} is no address of a server; write it as https://HOST or http://HOST:PORT")


def _is_server(address: str) -> bool:
    """Whether a text is an address with a host, and a port that is one, if any."""
    try:
        urlsplit(address).port  # noqa: B018 - it raises where the port is none, as of user:a/password@host
    except ValueError:
        return False
    return bool(SERVER.fullmatch(address))


def there_are(scheme: str) -> bool:
    """Whether anything gives credentials; where nothing else does, a machine of Amazon's may.

    Raises:
        BadInput: the token of a web identity cannot be read, or comes without a role; see
            of_profile.
    """
    if scheme != "s3" or os.environ.get("AWS_SKIP_SIGNATURE", "").lower() == "true":
        return True
    if (token := os.environ.get(WEB_IDENTITY)) and not os.environ.get("AWS_ACCESS_KEY_ID"):
        if not os.access(token, os.R_OK):
            raise BadInput(
                f"the setting {WEB_IDENTITY} names {token}, which cannot be read; name the file of the token"
            )
        if not os.environ.get("AWS_ROLE_ARN"):
            raise BadInput(f"got {WEB_IDENTITY} without AWS_ROLE_ARN; set the role that the token is for, too")
    if any(os.environ.get(name) for name in (*OWN, *CONTAINER)) or "access_key_id" in of_profile():
        return True
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    return _answers(os.environ.get("AWS_METADATA_ENDPOINT") or METADATA)


def _answers(address: str) -> bool:
    """Whether a server of metadata answers, whatever it says."""
    import http.client  # takes 10 ms, and few need it

    try:
        where = urlsplit(address)
        asked = http.client.HTTPConnection(where.hostname or "", where.port or 80, timeout=METADATA_SECONDS)
        try:
            asked.request("PUT", "/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
            asked.getresponse()
        finally:
            asked.close()
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def of_profile() -> Settings:
    """What the profile in use says of S3: keys, region and server, as far as no variable does.

    The profile is AWS_PROFILE, or `default`. Its keys are left out where variables hold keys.

    Raises:
        BadInput: a file of profiles cannot be read, holds no profile of the name, or the profile
            leads to keys that only AWS's own tools fetch.
    """
    name = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or ""
    profile, known = _profile(name or "default")
    if name and profile is None:
        raise BadInput(
            f"got AWS_PROFILE {name!r}{nearest(name, known)}; {' and '.join(map(str, _files()))} hold "
            f"{', '.join(known) or 'no profile'}"
        )
    about = profile or Settings()
    found = Settings()
    if not ({"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys()) and about.get("region"):
        found["region"] = about["region"]
    if not any(os.environ.get(variable) for variable in ENDPOINTS["s3"]) and about.get("endpoint_url"):
        found["endpoint"] = about["endpoint_url"]
    if any(os.environ.get(variable) for variable in OWN) or os.environ.get("AWS_SKIP_SIGNATURE", "").lower() == "true":
        return found
    if foreign := sorted(key for key in about if FOREIGN.match(key)):
        of = f" --profile {name}" if name else ""
        raise BadInput(
            f"the profile {name or 'default'!r} has {foreign[0]}, by which only AWS's own tools fetch keys: put keys into the "
            f'environment (`eval "$(aws configure export-credentials{of} --format env)"`)'
        )
    keys = Settings({ours: about[theirs] for theirs, ours in KEYS.items() if about.get(theirs)})
    if keys and not {"access_key_id", "secret_access_key"} <= keys.keys():
        raise BadInput(
            f"the profile {name or 'default'!r} lacks a key; aws_access_key_id and aws_secret_access_key go together"
        )
    found.update(keys)
    return found


def _profile(name: str) -> tuple[Settings | None, list[str]]:
    """A profile's settings, None if there is none, and the names of all profiles."""
    credentials, config = _files()
    keys, about = _read(credentials), _read(config)
    described = {section.removeprefix("profile ").strip(): section for section in about.sections()}
    described = {
        short: section for short, section in described.items() if section == f"profile {short}" or short == "default"
    }
    known = sorted({*keys.sections(), *described})
    if name not in known:
        return None, known
    found = Settings(about[described[name]] if name in described else {})
    found.update(keys[name] if keys.has_section(name) else {})
    return found, known


def _files() -> tuple[Path, Path]:
    """The files of keys and of profiles."""
    keys = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    return Path(os.path.expanduser(keys)), Path(
        os.path.expanduser(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config")
    )


def _changed(path: Path) -> tuple[int, int]:
    try:
        about = path.stat()
    except OSError:
        return 0, 0
    return about.st_mtime_ns, about.st_size


def _read(path: Path) -> configparser.RawConfigParser:
    """A file of profiles; empty if there is none."""
    parser, why = configparser.RawConfigParser(default_section="", strict=False, allow_no_value=True), ""
    try:
        parser.read_string(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        why = str(error.strerror)
    except (configparser.Error, UnicodeDecodeError):
        why = "it is no file of profiles"
    if why:  # raised here, since the error above may quote a line
        raise BadInput(
            f"cannot read {path} ({why}); mend it, or name another file (AWS_SHARED_CREDENTIALS_FILE, AWS_CONFIG_FILE)"
        )
    return parser
