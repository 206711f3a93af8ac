"""Commands as a message advises them."""

from __future__ import annotations

import re
import shlex

import pytest

from actstore.errors import advised


def advised_commands(message: str) -> list[list[str]]:
    """The words of each command of actstore's that a message tells to type, without `actstore`."""
    return [shlex.split(command)[1:] for command in re.findall(r"`(actstore [^`]+)`", message)]


@pytest.mark.parametrize(
    "words", [["repair", "s.act"], ["ingest", "my store/s.act", "--run", "a b"], ["sql", "s", "it's $x"]]
)
def test_a_command_is_quoted_as_a_shell_needs_it(words):
    assert advised_commands(f"wrong; {advised(*words)} mends it") == [words]
