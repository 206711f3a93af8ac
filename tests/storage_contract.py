"""What every place for bytes must do. A backend's tests inherit StorageContract and say how two processes get the place."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import xxhash

from actstore.errors import ActstoreError, Busy, Damaged
from actstore.storage.at import at
from actstore.storage.backend import File, Storage

RACERS = 8
IN_ANOTHER_PROCESS = """
import pickle, sys
place, contents = pickle.load(sys.stdin.buffer)
print("ready", flush=True)
for content in contents:
    {act}
print("done", flush=True)
sys.stdin.read()
"""


def described(path: str, content: bytes) -> File:
    return File(path, len(content), xxhash.xxh3_128_hexdigest(content))


def at_once(act: Callable[..., Any], path: str, contents: list[bytes], *more: Any) -> list[Any]:
    """What acting with each content gives, or the error of the package that it raises; all begin together."""
    barrier = threading.Barrier(len(contents))

    def run(content: bytes) -> Any:
        barrier.wait()
        try:
            return act(path, content, *more)
        except ActstoreError as error:
            return error

    with ThreadPoolExecutor(len(contents)) as threads:
        return list(threads.map(run, contents))


class StorageContract(ABC):
    """The promises of Storage. A place must pickle, so that another process can open it."""

    turns = 20  # of each race

    @abstractmethod
    def empty(self, tmp_path: Path) -> Storage:
        """A place without files."""

    @abstractmethod
    def put_in_the_way(self, place: Storage, path: str) -> None:
        """Have something that is no file stand under a path; skip the test where there can be none."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Storage:
        return self.empty(tmp_path)

    def process(self, place: Storage, act: str, contents: Sequence[bytes] = (b"",)) -> subprocess.Popen[bytes]:
        """Another process that acts with each content once a line is written to it; it waits until its input ends."""
        code = IN_ANOTHER_PROCESS.format(act=act)
        started = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # the place may be of a class of tests
        )
        assert started.stdin is not None
        assert started.stdout is not None
        started.stdin.write(pickle.dumps((place, contents)))
        started.stdin.flush()
        assert started.stdout.readline() == b"ready\n"
        return started

    # Publishing.

    def test_what_is_published_is_there_and_described(self, place: Storage) -> None:
        assert place.publish("a/b/x", b"content") == described("a/b/x", b"content")
        assert place.read("a/b/x") == b"content"
        assert place.size("a/b/x") == 7

    @pytest.mark.parametrize("content", [b"", bytes(3 << 20), memoryview(b"view")])
    def test_content_of_any_length_is_published(self, place: Storage, content: bytes) -> None:
        assert place.publish("x", content) == described("x", bytes(content))
        assert place.read("x") == bytes(content)

    def test_the_same_bytes_are_published_again_and_others_are_refused(self, place: Storage) -> None:
        first = place.publish("a/x", b"first")
        assert place.publish("a/x", b"first") == first
        for other in (b"other", b"longer than the first", b""):
            with pytest.raises(Damaged, match="a/x exists with other content"):
                place.publish("a/x", other)
        assert place.read("a/x") == b"first"
        assert place.list("") == ["a/x"]

    def test_of_eight_publishers_one_wins_and_the_others_are_told(self, place: Storage) -> None:
        for turn in range(self.turns):
            contents = [f"{number} ".encode() * 5000 for number in range(RACERS)]
            said = at_once(place.publish, f"race/{turn}", contents)
            won = [content for content, answer in zip(contents, said, strict=True) if isinstance(answer, File)]
            assert [place.read(f"race/{turn}")] == won
            assert sum(isinstance(answer, Damaged) for answer in said) == RACERS - 1

    def test_eight_publishers_of_the_same_bytes_all_win(self, place: Storage) -> None:
        for turn in range(self.turns):
            path, content = f"race/{turn}", f"{turn} ".encode() * 5000
            assert at_once(place.publish, path, [content] * RACERS) == [described(path, content)] * RACERS

    def test_two_processes_that_publish_the_same_names_share_them_out(self, place: Storage) -> None:
        act = "\n    ".join(["try: place.publish('p/' + content[1:].decode(), content)", "except OSError: pass"])
        ours, theirs = ([f"{who}{number}".encode() for number in range(200)] for who in "ab")
        won = set()
        with self.process(place, act, theirs) as other:
            for content in ours:
                with suppress(Damaged):
                    place.publish(f"p/{content[1:].decode()}", content)
                    won.add(content)
            assert other.stdout is not None
            assert other.stdout.readline() == b"done\n"
            assert other.stdin is not None
            other.stdin.close()
        there = {place.read(path) for path in place.list("p/")}
        assert len(there) == 200
        assert there - won <= {*theirs}
        assert there & {*ours} == won

    def test_a_file_of_another_place_is_adopted_whole_or_not_at_all(self, place: Storage) -> None:
        source, place = at(place.root / "source"), at(place.root / "made")
        for path, content in {"x": b"content", "y": bytes(3 << 20)}.items():
            file = source.publish(path, content)
            assert place.adopt(f"a/{path}", source, file) == described(f"a/{path}", content)
            assert place.adopt(f"a/{path}", source, file) == described(f"a/{path}", content)
            assert place.read(f"a/{path}") == content
        for wrong in (described("x", b"Content"), described("x", b"more than that")):
            with pytest.raises(Damaged):
                place.adopt("b", source, wrong)
        with pytest.raises(FileNotFoundError):
            place.adopt("b", source, described("z", b""))
        with pytest.raises(Damaged, match="a/x exists with other content"):
            place.adopt("a/x", source, described("y", bytes(3 << 20)))
        assert place.list("") == ["a/x", "a/y"]
        source.swap("x", b"another")
        source.delete("y")
        assert (place.read("a/x"), place.size("a/y")) == (b"content", 3 << 20), "what becomes of the source is its own"

    # Swapping.

    def test_a_swap_replaces_what_its_token_tells(self, place: Storage) -> None:
        assert place.token("a/x") is None
        place.swap("a/x", b"one", None)
        one = place.token("a/x")
        place.swap("a/x", b"two", one)
        assert (place.read("a/x"), place.list("")) == (b"two", ["a/x"])
        assert place.token("a/x") not in (None, one)

    def test_a_swap_with_a_stale_token_leaves_all_as_it_was(self, place: Storage) -> None:
        place.swap("x", b"one")
        stale = place.token("x")
        place.swap("x", b"two", stale)
        for expected in (stale, None):
            with pytest.raises(Busy, match="x meanwhile"):
                place.swap("x", b"late", expected)
        with pytest.raises(Busy):
            place.swap("y", b"late", stale)
        assert (place.read("x"), place.list("")) == (b"two", ["x"])

    def test_a_file_that_another_replaced_by_one_of_its_size_is_not_swapped(self, place: Storage) -> None:
        place.swap("x", b"one")
        token = place.token("x")
        for late in (b"two", b"six"):
            at(place.root).swap("x", late)
            with pytest.raises(Busy, match="x meanwhile"):
                place.swap("x", b"own", token)
            assert place.read("x") == late

    def test_a_swap_of_any_takes_whatever_is_there(self, place: Storage) -> None:
        for content in (b"one", b"two", b""):
            place.swap("x", content)
            assert place.read("x") == content

    def test_of_eight_that_swap_with_one_token_one_wins(self, place: Storage) -> None:
        for turn in range(self.turns):
            token, contents = place.token("x"), [f"{turn} {number}".encode() for number in range(RACERS)]
            said = at_once(place.swap, "x", contents, token)
            assert [content for content, error in zip(contents, said, strict=True) if error is None] == [
                place.read("x")
            ]
            assert sum(isinstance(error, Busy) for error in said) == RACERS - 1

    def test_what_is_written_by_a_function_takes_the_place(self, place: Storage) -> None:
        place.swap("a/x", lambda path: path.write_bytes(b"written"))
        assert place.read("a/x") == b"written"

    # Torn writes.

    @pytest.mark.parametrize("before", [None, b"before"])
    @pytest.mark.parametrize("fault", [OSError("of the disk"), KeyboardInterrupt(), MemoryError()])
    def test_a_write_that_fails_midway_leaves_what_was_there(
        self, place: Storage, before: bytes | None, fault: BaseException
    ) -> None:
        if before is not None:
            place.swap("x", before)

        def torn(path: Path) -> None:
            path.write_bytes(b"half of i")
            raise fault

        with pytest.raises(type(fault)):
            place.swap("x", torn)
        assert [place.read(path) for path in place.list("")] == [before] * (before is not None)
        place.swap("x", b"the next try")
        assert place.read("x") == b"the next try"

    def test_a_writer_that_is_killed_midway_leaves_what_was_there(self, place: Storage) -> None:
        place.swap("x", b"before")
        act = "place.swap('x', lambda path: (path.write_bytes(b'half'), print('done', flush=True), sys.stdin.read()))"
        with self.process(place, act) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"done\n"
            assert place.list("") == ["x"], "a file that is being written shows"
            other.send_signal(signal.SIGKILL)
        assert (place.list(""), place.read("x")) == (["x"], b"before")

    # Reading.

    def test_what_is_not_there_is_told(self, place: Storage) -> None:
        place.publish("a/file", b"")
        for path in ("x", "a/x", "no/such/x"):
            for read in (place.read, place.size, lambda path: place.read_ranges(path, [(0, 1)]), place.open_for_map):
                with pytest.raises(FileNotFoundError):
                    read(path)
            assert place.token(path) is None

    def test_what_is_no_file_is_damage(self, place: Storage) -> None:
        self.put_in_the_way(place, "a/x")
        for read in (place.read, place.size, place.token, lambda path: place.read_ranges(path, [(0, 1)])):
            with pytest.raises(Damaged):
                read("a/x")

    def test_a_file_longer_than_was_asked_for_is_not_read(self, place: Storage) -> None:
        place.publish("x", bytes(11))
        assert place.read("x", 11) == bytes(11)
        with pytest.raises(Damaged, match="11 bytes"):
            place.read("x", 10)

    def test_ranges_come_in_their_order_and_end_with_the_file(self, place: Storage) -> None:
        place.publish("x", bytes(range(100)))
        assert place.read_ranges("x", []) == []
        asked = [(90, 5), (0, 3), (0, 3), (7, 0), (98, 10), (100, 1), (5000, 1), (0, 1000)]
        assert place.read_ranges("x", asked) == [bytes(range(100))[start : start + n] for start, n in asked]
        many = [(start * 7 % 100, start % 9) for start in range(2000)]
        assert place.read_ranges("x", many) == [bytes(range(100))[start : start + n] for start, n in many]

    def test_a_file_that_was_just_written_is_young_and_one_that_is_not_there_has_no_age(self, place: Storage) -> None:
        place.swap("a", b"1")
        assert -1 <= place.age("a") < 60
        assert place.list("") == ["a"]
        with pytest.raises(FileNotFoundError):
            place.age("b")

    def test_paths_are_listed_by_prefix_in_order(self, place: Storage) -> None:
        paths = ["b", "a/z", "a/10", "a/9", "a/b/c", "ab/x", "a-b", "é/ü"]
        for path in paths:
            place.publish(path, b"")
        for prefix in ("", "a", "a/", "a/b", "a/b/c", "no", "no/such/"):
            assert place.list(prefix) == sorted(path for path in paths if path.startswith(prefix))

    def test_what_was_deleted_is_gone_and_may_be_published_anew(self, place: Storage) -> None:
        place.publish("a/x", b"one")
        place.publish("a/y", b"y")
        place.delete("a/x")
        assert place.list("") == ["a/y"]
        for absent in ("a/x", "a/y/x", "no/x"):
            place.delete(absent)
        place.publish("a/x", b"two")
        assert place.read("a/x") == b"two"

    # The lease, room, maps.

    def test_one_at_a_time_holds_the_lease(self, place: Storage) -> None:
        with place.lease() as held:
            held.check()
            for wait in (0.0, 0.15):
                with pytest.raises(Busy), place.lease(wait):
                    pass
        with pytest.raises(RuntimeError), place.lease():
            raise RuntimeError
        with place.lease():
            pass

    def test_a_lease_ends_with_its_process(self, place: Storage) -> None:
        act = "with place.lease(): print('done', flush=True); sys.stdin.read()"
        with self.process(place, act) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"done\n"
            with pytest.raises(Busy), place.lease():
                pass
            other.send_signal(signal.SIGKILL)
            with place.lease(wait=10):
                pass

    def test_a_place_is_made_once_and_whole(self, place: Storage) -> None:
        def fails(root: Path) -> None:
            raise OSError("of the disk")

        place = at(place.root / "made")
        with pytest.raises(OSError, match="of the disk"):
            place.make("last", ["a"], fails)
        assert not place.has("last")
        for content in (b"first", b"second"):

            def fill(root: Path, content: bytes = content) -> None:
                at(root).publish("a/x", content)
                at(root).publish("last", content)

            assert place.unusable() == place.unwritable() == "" or place.has("last")
            place.make("last", ["a"], fill)
        assert (place.read("a/x"), place.read("last")) == (b"first", b"first")

    def test_a_token_is_the_hash_of_the_content(self, place: Storage) -> None:
        assert place.publish("x", b"content").xxh3_128 == place.token("x")

    def test_something_has_a_path_or_nothing_has(self, place: Storage) -> None:
        place.publish("a/x", b"")
        assert [place.has(path) for path in ("a/x", "x", "a/x/y", "no/x")] == [True, False, False, False]

    def test_what_no_path_names_is_listed_and_tidying_leaves_the_rest(self, place: Storage) -> None:
        for path in ("a/x", "a/b/y", "a/z", "c/x", "top"):
            place.publish(path, b"")
        assert list(place.unnamed(["a", "no"], ["a/z", "c/x"])) == ["a/b/y", "a/x"]
        assert list(place.unnamed(["a"], ["a/z", "a/x", "a/b/y"])) == []
        place.tidy(["top"], ["a", "no"])
        assert place.list("") == ["a/b/y", "a/x", "a/z", "c/x", "top"]
        assert not place.linked(["a/x"])
        assert place.broken("a/x") == ""

    def test_a_library_gets_paths_of_this_machine(self, place: Storage) -> None:
        contents = {"a/x": b"1", "a/b/y": bytes(3 << 20), "a/xx": b"3"}
        for path, content in contents.items():
            place.publish(path, content)
        with place.local(contents) as paths:
            assert [path.read_bytes() for path in paths] == list(contents.values())
        with place.local(["a"]) as [folder]:
            assert {path: (folder.parent / path).read_bytes() for path in contents} == contents
        with pytest.raises(FileNotFoundError), place.local(["b"]) as [absent]:
            absent.read_bytes()

    def test_a_descriptor_shows_the_file_to_its_end(self, place: Storage) -> None:
        place.publish("x", b"content")
        descriptor = place.descriptor("x")
        try:
            place.swap("x", b"another")
            assert os.pread(descriptor, 10, 0) == b"content"
            assert os.fstat(descriptor).st_size == 7
        finally:
            os.close(descriptor)
        with pytest.raises(FileNotFoundError):
            place.descriptor("y")

    def test_what_is_held_open_compares_hashes_if_it_is_given_any(self, place: Storage) -> None:
        hashes = {path: place.publish(path, path.encode()).xxh3_128 for path in ("a", "b")}
        for committed in (None, {"a": hashes["a"], "b": hashes["a"]}):
            held = place.hold(committed)
            held.check()
            assert held.identity() == place.hold().identity()
            assert (held.read("a"), held.committed) == (b"a", committed)
            if committed:
                for read in (held.read, held.descriptor):
                    with pytest.raises(Damaged, match="not what was committed"):
                        read("b")
            held.close()

    def test_room_is_a_number_of_bytes(self, place: Storage) -> None:
        assert place.free_room() > 0

    def test_what_can_be_mapped_is_the_file(self, place: Storage) -> None:
        place.publish("x", b"content")
        if (descriptor := place.open_for_map("x")) is None:
            pytest.skip("this place has no descriptors: its bytes are read by ranges")
        try:
            assert os.pread(descriptor, 10, 0) == b"content"
            place.swap("x", b"another")
            assert os.pread(descriptor, 10, 0) == b"content", "who has mapped a file keeps it"
        finally:
            os.close(descriptor)
