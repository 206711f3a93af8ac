"""Where credentials come from, and that none of them gets out: into no message, log, repr, pickle or traceback."""

from __future__ import annotations

import io
import logging
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import ActstoreError, BadInput, Unreachable
from actstore.storage import bucket as requests
from actstore.storage import credentials
from actstore.storage.at import at
from actstore.storage.bucket import Bucket
from actstore.store import Store
from actstore.writing.writer import open_writer
from tests.bucket_server import BUCKET, KEY, SECRET
from tests.stores import fake
from tests.test_objects import address

pytestmark = pytest.mark.usefixtures("s3")
GOOD = f"aws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
Profiles = Callable[..., None]


def with_locals(error: BaseException) -> Iterator[str]:
    """An error's traceback from below the test's own frame on, with all variables, and with what it was raised in."""
    assert error.__traceback__ is not None
    told = traceback.TracebackException(type(error), error, error.__traceback__.tb_next, capture_locals=True)
    told.__suppress_context__ = False
    return told.format()


@pytest.fixture(scope="module")
def kept(s3: dict[str, str]) -> Path:
    fake(n_trees=1, trees_per_shard=1, sites=("resid_post.0",)).store(root := address("credentials"))
    return root


@pytest.fixture
def profiles(s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profiles:
    """Writes the files of profiles; the environment then holds no keys and no server."""

    def write(keys: str = "", config: str = "", name: str | None = None) -> None:
        for variable in [variable for variable in os.environ if variable.startswith("AWS_")]:
            monkeypatch.delenv(variable)
        for variable, text in {"AWS_SHARED_CREDENTIALS_FILE": keys, "AWS_CONFIG_FILE": config}.items():
            (tmp_path / variable).write_text(text.replace("$URL", s3["AWS_ENDPOINT_URL"]))
            monkeypatch.setenv(variable, str(tmp_path / variable))
        if name:
            monkeypatch.setenv("AWS_PROFILE", name)

    return write


CONFIG = "region = us-east-1\nendpoint_url = $URL\n"


@pytest.mark.parametrize(
    ("keys", "config", "name"),
    [
        (f"[default]\n{GOOD}", f"[default]\n{CONFIG}", None),
        (
            f"[default]\naws_access_key_id = x\naws_secret_access_key = y\n[work]\n{GOOD}",
            f"[profile work]\n{CONFIG}",
            "work",
        ),
        ("", f"[default]\nsso_session = x\n[profile work]\n{CONFIG}{GOOD}s3 =\n  addressing_style = path\n", "work"),
    ],
)
def test_a_profile_gives_keys_region_and_server(
    profiles: Profiles, kept: Path, keys: str, config: str, name: str | None
) -> None:
    profiles(keys, config, name)
    with Store(kept) as store:
        assert store.runs() == ["r"]


def test_variables_come_before_a_profile(
    profiles: Profiles, kept: Path, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles("[work]\naws_access_key_id = x\naws_secret_access_key = y\n", "[profile work]\nsso_session = x\n", "work")
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    assert at(kept).has("store.json")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert at(kept).has("store.json"), "a server for S3 alone comes first"


@pytest.mark.parametrize(
    ("keys", "config", "name", "said"),
    [
        (
            f"[works]\n{GOOD}",
            "[profile home]\n",
            "work",
            r"got AWS_PROFILE 'work' \(did you mean 'works'.* hold home, works",
        ),
        ("", "", "work", "hold no profile"),
        (
            "",
            "[profile work]\nsso_session = x\n",
            "work",
            "has sso_session, .*export-credentials --profile work --format env",
        ),
        (
            "",
            "[default]\ncredential_process = cat secret\n",
            None,
            "has credential_process, .*credentials --format env",
        ),
        (f"[default]\n{GOOD}", "[default]\nrole_arn = arn\nsource_profile = x\n", None, "has role_arn"),
        (f"[default]\naws_secret_access_key = {SECRET}\n", "", None, "the profile 'default' lacks a key"),
        (f"aws_secret_access_key = {SECRET}\n", "", None, "it is no file of profiles"),
    ],
)
def test_what_a_profile_lacks_is_told(
    profiles: Profiles, kept: Path, keys: str, config: str, name: str | None, said: str
) -> None:
    profiles(keys, config, name)
    with pytest.raises(BadInput, match=said) as caught:
        at(kept).has("store.json")
    shown = "".join(with_locals(caught.value))
    assert SECRET not in shown
    assert KEY not in shown
    assert "\n" not in str(caught.value)


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that takes connections and never answers, as an address that leads nowhere."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def test_without_credentials_a_machines_own_are_asked_for_once_and_not_waited_for(
    profiles: Profiles, kept: Path, silent: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, obstore and its caller asked again and again: three minutes where no answer comes."""
    profiles()
    monkeypatch.setattr(credentials, "METADATA_SECONDS", 0.1)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
    result = CliRunner().invoke(main, ["info", str(kept)])
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "there are no credentials for s3://tests: look at the credentials" in result.output
    silent.accept()[0].close()
    with pytest.raises(BlockingIOError):
        silent.accept()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(Unreachable, match="there are no credentials"):
        at(kept).has("store.json")
    with pytest.raises(BlockingIOError):
        silent.accept()


def test_a_web_identity_that_cannot_be_used_is_told(
    profiles: Profiles, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles()
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(BadInput, match="token, which cannot be read; name the file of the token"):
        at(kept).has("store.json")
    (tmp_path / "token").write_text("x")
    with pytest.raises(BadInput, match="without AWS_ROLE_ARN; set the role"):
        at(kept).has("store.json")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("AWS_ACCESS_KEY_ID", f"{KEY}\r", "the setting AWS_ACCESS_KEY_ID holds a line break"),
        ("AWS_SESSION_TOKEN", "token\n", "the setting AWS_SESSION_TOKEN holds a line break"),
        ("AWS_ENDPOINT_URL", "127.0.0.1:9", "AWS_ENDPOINT_URL is no address of a server"),
        ("AWS_ENDPOINT_URL", f"http://{SECRET} @host", "AWS_ENDPOINT_URL is no address of a server"),
        ("AWS_ENDPOINT_URL", f"http://user:{SECRET}/@host", "AWS_ENDPOINT_URL is no address of a server"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:70000", "AWS_ENDPOINT_URL is no address of a server"),
    ],
)
def test_a_setting_that_would_end_in_a_panic_is_told(
    kept: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadInput, match=said) as caught:
        at(kept).has("store.json")
    assert value not in str(caught.value)


def test_no_credentials_get_out(
    kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(requests, "RETRIES", {**requests.RETRIES, "max_retries": 0})
    token = "a-session-token-of-the-tests"
    shown = io.StringIO()

    def show(*what: object) -> None:
        print(*what, file=shown)

    with Store(kept) as store:
        show(repr(store), pickle.dumps(store.batches("from tokens", site="resid_post.0")))
    for thing in (Bucket(kept), at(kept), at(kept).hold()):
        show(repr(thing), pickle.dumps(thing), vars(thing))
    show(repr(credentials.Settings(secret_access_key=SECRET)), credentials.fingerprint("s3"))
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(credentials.Settings(secret_access_key=SECRET))
    for changes in (
        {"AWS_SECRET_ACCESS_KEY": "wrong-secret"},
        {"AWS_ACCESS_KEY_ID": "wrong-key"},
        {"AWS_SESSION_TOKEN": token},
        {"AWS_REGION": "no region"},
        {"AWS_SECRET_ACCESS_KEY": "wrong-secret\r"},
        {"AWS_ENDPOINT_URL": f"http://{KEY}:{SECRET}@127.0.0.1:9/?{token}"},
        {"AWS_ENDPOINT_URL": f"ftp://{SECRET}"},
    ):
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setenv(name, value)
            for words in (["info", str(kept)], ["verify", str(kept)], ["drop", str(kept), "--run", "r", "--yes"]):
                show(CliRunner().invoke(main, words).output)
            for act in (lambda: Store(kept), lambda: at(kept).publish("x", b""), open_writer(kept).__enter__):
                try:
                    act()
                except ActstoreError as error:
                    show(*with_locals(error), repr(error), pickle.dumps(error))
    with suppress(ActstoreError):
        Bucket(Path("s3://no-such-bucket/x")).put("x", b"")
    out, err = capfd.readouterr()
    there = [shown.getvalue(), caplog.text, out, err, *(str(at(kept).read(path)) for path in at(kept).list(""))]
    for secret in (SECRET, KEY, "wrong-secret", "wrong-key", token):
        assert [text[max(0, text.find(secret) - 200) :][:400] for text in there if secret in text] == []
    assert not any(SECRET in str(Bucket(kept).get(key).content) for key in Bucket(kept).sizes(""))
    assert BUCKET in shown.getvalue()
