"""Tests for those who change dropbox_storage.

Of the fake Dropbox, of threads, memory and garbage, of random sequences, and of what the
real Dropbox may turn out to do.
"""

import collections
import contextlib
import datetime
import functools
import gc
import hashlib
import importlib
import io
import itertools
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import types
import unicodedata
import unittest
import weakref

import dropbox
import hypothesis
import requests
from django.core.cache import cache
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files.base import ContentFile
from django.db import models
from django.db.models.fields.files import FieldFile
from django.test import SimpleTestCase
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from test_dropbox_storage import (  # noqa: F401
    HASH_BLOCK,
    HERE,
    HUGE,
    LARGE,
    OPERATIONS,
    PERMANENT,
    QUIRKS,
    REFRESHING,
    TRANSIENT,
    TRUE_SIZES,
    UNIT,
    Broken,
    DropboxStorage,
    DropboxStorageException,
    Entry,
    FakeAccount,
    FakeDropbox,
    FakeDropboxMixin,
    MiB,
    Refused,
    StallingAccount,
    StorageTestCase,
    Unsized,
    content_hash,
    module,
    noise,
    run_python,
    setUpModule,
    tearDownModule,
    true_sizes,
)


class FakeDropboxTests(unittest.TestCase):
    """The fake does what Dropbox does, as the SDK sees it."""

    def setUp(self):
        self.account = FakeAccount(page_size=2)
        self.client = FakeDropbox(self.account)

    def refusal(self, method, *args, **kwargs):
        with self.assertRaises(dropbox.exceptions.DropboxException) as caught:
            getattr(self.client, method)(*args, **kwargs)
        return str(caught.exception)

    def test_upload_download_and_delete(self):
        add = dropbox.files.WriteMode.add
        self.client.files_upload(b"one", "/Dir/a.txt")
        self.assertEqual(self.client.files_upload(b"one", "/dir/A.txt").name, "a.txt")
        refused = self.refusal("files_upload", b"two", "/dir/A.txt", add)
        self.assertIn("WriteConflictError('file', None)", refused)
        self.assertIn("upload_session_id", refused)
        self.assertIn("'folder'", self.refusal("files_upload", b"", "/dir"))
        self.assertIn(
            "file_ancestor", self.refusal("files_upload", b"", "/dir/a.txt/b")
        )
        self.assertIn("malformed", self.refusal("files_upload", b"", "/dir/b "))
        self.assertIn("disallowed", self.refusal("files_upload", b"", "/Desktop.ini"))
        metadata, response = self.client.files_download("/dir/a.TXT")
        self.assertEqual((metadata.size, response.content), (3, b"one"))
        self.assertEqual(metadata.content_hash, content_hash(b"one"))
        self.client.files_delete_v2("/DIR")
        self.assertIn("not_found", self.refusal("files_get_metadata", "/dir/a.txt"))
        self.assertIn("unsupported", self.refusal("files_get_metadata", "/"))

    def test_ranges_revisions_and_update(self):
        old = self.client.files_upload(b"0123456789", "/a")
        self.client._headers = {"Range": "bytes=2-4"}
        response = self.client.files_download("/a")[1]
        self.assertEqual((response.status_code, response.content), (206, b"234"))
        self.assertEqual(response.headers["Content-Range"], "bytes 2-4/10")
        self.client._headers = None
        update = dropbox.files.WriteMode.update
        self.client.files_upload(b"new", "/a", mode=update(old.rev))
        content = self.client.files_download(f"rev:{old.rev}")[1].content
        self.assertEqual(content, b"0123456789")
        refused = self.refusal("files_upload", b"x", "/a", mode=update(old.rev))
        self.assertIn("'conflict'", refused)

    def test_pages_and_their_end(self):
        for name in "abcde":
            self.client.files_upload(b"", f"/{name}/f")
        page, names = self.client.files_list_folder(""), []
        while names.extend(entry.name for entry in page.entries) or page.has_more:
            page = self.client.files_list_folder_continue(page.cursor)
        self.assertEqual(names, list("abcde"))
        self.account.cursors.clear()
        self.assertIn("reset", self.refusal("files_list_folder_continue", page.cursor))
        self.assertIn('""', self.refusal("files_list_folder", "/"))

    def test_upload_sessions(self):
        files, client = dropbox.files, self.client
        kind = files.UploadSessionType.concurrent
        session = client.files_upload_session_start(b"", session_type=kind).session_id
        cursor = files.UploadSessionCursor(session, 5)
        append = "files_upload_session_append_v2"
        self.assertIn("invalid_offset", self.refusal(append, b"x", cursor))
        cursor.offset = HASH_BLOCK
        self.assertIn("invalid_data_size", self.refusal(append, b"x", cursor))
        client.files_upload_session_append_v2(b"end", cursor, close=True)
        self.assertIn("closed", self.refusal(append, b"x", cursor, close=True))
        cursor.offset, commit = HASH_BLOCK + 3, files.CommitInfo("/a")
        finish = "files_upload_session_finish"
        self.assertIn("missing", self.refusal(finish, b"", cursor, commit))
        self.account.sessions[session].pieces[0] = bytes(HASH_BLOCK)
        self.assertEqual(
            client.files_upload_session_finish(b"", cursor, commit).size, cursor.offset
        )
        self.assertIn("not_found", self.refusal(finish, b"", cursor, commit))
        serial = client.files_upload_session_start(b"abc").session_id
        cursor = files.UploadSessionCursor(serial, 1)
        self.assertIn("correct_offset=3", self.refusal(append, b"x", cursor))

    def test_what_is_rarer(self):
        files, client = dropbox.files, self.client
        closed = client.files_upload_session_start(
            b"", close=True, session_type=files.UploadSessionType.concurrent
        )
        cursor = files.UploadSessionCursor(closed.session_id, 0)
        append = "files_upload_session_append_v2"
        self.assertIn("closed", self.refusal(append, bytes(4 * UNIT), cursor))
        one = client.files_upload(b"one", "/a.txt")
        self.assertEqual(client.files_download(one.id)[1].content, b"one")
        other = client.files_upload(b"two", "/A.txt", autorename=True)
        self.assertEqual(other.path_display, "/A (1).txt")
        self.assertNotEqual(other.id, one.id)
        self.assertIn("not_found", self.refusal("files_get_metadata", "id:unknown"))
        self.assertRaises(Refused, self.account.find, "rev:1")
        client._headers = {"Range": "bytes=-2"}
        self.assertEqual(client.files_download("/a.txt")[1].content, b"one")
        self.assertEqual(len(client.files_list_folder("", limit=1).entries), 1)
        url = "https://api.dropboxapi.com/2/files/get_metadata"
        headers = {"Authorization": "Bearer valid-token"}
        response = client._session.post(url, data=b"{", headers=headers)
        self.assertIn("could not decode", response.text)

    def test_a_temporary_link_can_be_followed(self):
        self.client.files_upload(b"one", "/a.txt")
        link = self.client.files_get_temporary_link("/a.txt").link
        self.assertEqual(self.account.follow(link), b"one")
        with self.assertRaises(requests.HTTPError):
            self.account.follow(f"{link}x")

    def test_it_can_replace_dropbox_for_all_storages(self):
        class Computed(DropboxStorage):
            oauth2_access_token = property(lambda self: 1 / 0)

        before = DropboxStorage("some-token")
        links = set()
        for _ in range(2):
            with FakeAccount().replace_dropbox() as account:
                for storage in (before, DropboxStorage(), Computed(root_path="/c")):
                    name = storage.save("a", ContentFile(b"x"))
                    self.assertEqual(storage.open(name).read(), b"x")
                    link = storage.url(name)
                    self.assertEqual(account.follow(link), b"x")
                self.assertEqual(len(account.files()), 3)
                links.add(link)
        self.assertIsNot(before.client, account)
        with self.assertRaises(ImproperlyConfigured):
            DropboxStorage().exists("a")

    def test_the_mixin_gives_each_test_an_account(self):
        class UploadTests(FakeDropboxMixin, SimpleTestCase):
            def test_one(self):
                DropboxStorage().save("a", ContentFile(b"x"))
                assert self.account.files() == {"/a": b"x"}

            test_two = test_one

        result = unittest.TestResult()
        for name in ("test_one", "test_two"):
            UploadTests(name).run(result)
        self.assertEqual((result.testsRun, result.errors, result.failures), (2, [], []))

    def test_faults(self):
        self.account.fail("files/get_metadata", "missing_scope")
        self.assertIn("AuthError", self.refusal("files_get_metadata", "/a"))
        self.assertIn("not_found", self.refusal("files_get_metadata", "/a"))
        self.account.put("/a", b"0123456789" * 100)
        self.account.fail("files/download", "truncate")
        with self.assertRaises((requests.RequestException, AssertionError)):
            self.assertEqual(len(self.client.files_download("/a")[1].content), 1000)
        self.assertEqual(self.account.calls["files/get_metadata"], 2)

    def test_fail_refuses_what_it_does_not_know(self):
        with self.assertRaisesRegex(ValueError, "Unknown route 'files/uplaod'"):
            self.account.fail("files/uplaod", "503")
        with self.assertRaisesRegex(ValueError, "Unknown kind '5O3'"):
            self.account.fail("files/upload", "5O3")

    def test_paths_are_folded_letter_by_letter_if_asked(self):
        self.account.put("/ΣΑΣ", b"1")
        self.account.put("/σας", b"2")
        folding = FakeAccount(quirks=("folding",))
        folding.put("/ΣΑΣ", b"1")
        folding.put("/σας", b"2")
        self.assertEqual(len(self.account.files()), 1)
        self.assertEqual(len(folding.files()), 2)

    def test_the_first_part_of_this_file_works_alone(self):
        text = HERE.read_text(encoding="utf-8")
        fake = text[: text.index("# ---- The end of the fake")]
        name = f"test_{module.__name__.rpartition('.')[2]}"
        code = textwrap.dedent(f"""
            from django.conf import settings; settings.configure()
            from django.core.files.base import ContentFile
            from {name} import FakeAccount
            account = FakeAccount()
            account.storage().save("a", ContentFile(b"x"))
            print(account.files())
        """)
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(module.__file__, folder)
            pathlib.Path(folder, f"{name}.py").write_text(fake, encoding="utf-8")
            shown = run_python(code, folder)
        self.assertEqual(shown, "{'/a': b'x'}\n")


@unittest.skipUnless(hasattr(signal, "setitimer"), "needs POSIX's signals")
class SignalTests(unittest.TestCase):
    def test_time_limits_leave_nothing_locked(self):
        """Eight threads whose tokens are always expired, and a time limit every few ms."""
        folder = str(pathlib.Path(__file__).parent)
        code = f"sys.path.insert(0, {folder!r}); import test_guards as t"
        done = run_python(f"{code}; t.signal_stress(2)", timeout=120)
        self.assertRegex(done, r"^\d+ signals, \d+ calls, all threads went on$")


def signal_stress(seconds):
    """Raise an exception in the main thread every few ms while eight threads work."""

    class TimeLimit(Exception):
        pass

    account, calls, signals = FakeAccount(), collections.Counter(), 0
    account.expires_in = 0
    storage = account.storage(**REFRESHING, timeout=5)
    end = time.monotonic() + seconds

    def work(name):
        while time.monotonic() < end:
            storage.exists(name)
            calls[name] += 1

    def limit(number, frame):
        nonlocal signals
        signals += 1
        raise TimeLimit

    threads = [
        threading.Thread(target=work, args=[f"{n}"], daemon=True) for n in range(7)
    ]
    for thread in threads:
        thread.start()
    before = signal.signal(signal.SIGALRM, limit)
    while time.monotonic() < end:
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.008))
                work("main")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except TimeLimit:
            pass
    signal.signal(signal.SIGALRM, before)
    counted, end = calls.copy(), time.monotonic() + 30
    for thread in [threading.Thread(target=work, args=["late"], daemon=True), *threads]:
        if not thread.ident:
            thread.start()
    while calls["late"] < 20 and time.monotonic() < end:
        time.sleep(0.01)
    end = 0
    for thread in threads:
        thread.join(10)
    stuck = [thread.name for thread in threads if thread.is_alive()]
    went_on = "all threads went on" if calls["late"] >= 20 and not stuck else stuck
    print(f"{signals} signals, {sum(counted.values())} calls, {went_on}", end="")


class SinkAccount(FakeAccount):
    """Takes uploads without keeping them: all blocks are ZEROS."""

    def files_upload_session_append_v2(self, argument, body):
        time.sleep(0.01)  # so that those who do not wait pile up chunks
        with self.lock:
            self.bytes_kept = getattr(self, "bytes_kept", 0) + len(body)

    def files_upload_session_finish(self, argument, body):
        digest = hashlib.sha256(ZEROS).digest() * (self.bytes_kept // HASH_BLOCK)
        found = Entry(
            "/big", b"", "0123456789", "2024-07-01T12:00:00Z", id="id:1"
        ).metadata()
        found["content_hash"] = hashlib.sha256(digest).hexdigest()
        return {**found, "size": self.bytes_kept}


ZEROS = bytes(4 * MiB)


class MemoryTests(StorageTestCase):
    """However large a file is, it is never in memory as a whole. At true size."""

    limit = 48 * MiB

    def setUp(self):
        super().setUp()
        sizes = true_sizes()
        sizes.__enter__()
        self.addCleanup(sizes.__exit__, None, None, None)

    def peak(self, act):
        tracemalloc = importlib.import_module("tracemalloc")  # CPython has it
        tracemalloc.start()
        try:
            act()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def test_saving(self):
        for kind in (None, "503", "reset"):
            account = SinkAccount()
            storage = account.storage()
            account.bytes_kept = 0
            if kind:
                account.fail("files/upload_session/append_v2", kind, times=12)
            content = Unsized()
            content.chunks = lambda: itertools.repeat(ZEROS[: 64 * 1024], 128 * 16)
            peak = self.peak(lambda: storage.save("big", content))
            self.assertEqual(account.bytes_kept, 128 * MiB)
            self.assertLess(peak, self.limit)

    def test_saving_what_comes_in_one_piece(self):
        account = SinkAccount()
        storage, one = account.storage(), ContentFile(ZEROS * 32)
        account.bytes_kept = 0
        self.assertLess(self.peak(lambda: storage.save("big", one)), self.limit)

    def test_reading(self):
        self.account.put("/big", ZEROS * 32)

        def read():
            with self.storage.open("big") as file:
                self.assertEqual(sum(map(len, file.chunks())), 128 * MiB)

        self.assertLess(self.peak(read), self.limit)

    def test_reading_at_once(self):
        """The file is in memory once, apart from the blocks."""
        self.account.put("/big", ZEROS * 32)

        def read():
            with self.storage.open("big") as file:
                self.assertEqual(len(file.read()), 128 * MiB)

        self.assertLess(self.peak(read), 128 * MiB * 9 // 8 + self.limit)

    def test_chunks_and_blocks_have_the_sizes_that_are_documented(self):
        self.account.put("/big", ZEROS * 5)
        self.assertEqual(
            [size / MiB for size in TRUE_SIZES], [4, 150, 8, 2, 0.5, 0.125, 0.25]
        )
        self.assertEqual(DropboxStorage.CHUNK_SIZE, 4 * MiB)
        with self.costs("files/download"), self.storage.open("big") as file:
            file.read(2 * MiB)
        for size, calls in ((8 * MiB, 1), (8 * MiB + 1, 5)):
            before = sum(self.account.calls.values())
            self.storage._save(f"{size}", ContentFile((ZEROS * 3)[:size]))
            self.assertEqual(sum(self.account.calls.values()) - before, calls)


class GarbageTests(StorageTestCase):
    """No call makes a cycle, which would keep a file until the collector runs."""

    def garbage(self, act):
        """The frames, and the objects of the module, that only the collector finds."""
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            act()
            gc.collect()
            kinds = (types.FrameType, types.TracebackType)
            return [
                one
                for one in gc.garbage
                if isinstance(one, kinds) or type(one).__module__ == module.__name__
            ]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    @unittest.skipIf(sys.implementation.name != "cpython", "needs CPython's collector")
    def test_no_call_makes_a_cycle(self):
        for kind, times in ((None, 1), ("503", 1), ("503", 999), ("bad_input", 9)):
            storages = {}
            for operation, (options, _) in OPERATIONS.items():
                account = FakeAccount()
                account.put("/a", b"old")
                account.put("/huge", HUGE)
                account.put("/dir/0")
                storages[operation] = account.storage(**options, max_wait=1)
                if kind:
                    account.fail("*", kind, times=times)

            def act(storages=storages):
                for operation, storage in storages.items():
                    with contextlib.suppress(Exception):
                        OPERATIONS[operation][1](storage)
                self.ends_its_threads()

            with self.subTest(kind=kind, times=times):
                self.assertEqual(self.garbage(act), [])

    def test_a_closed_file_keeps_no_content_and_no_exception(self):
        self.account.put("/huge", HUGE)
        blocks = weakref.WeakSet()
        init = module._Block.__init__

        def note(block, *args):
            blocks.add(block)
            init(block, *args)

        with unittest.mock.patch.object(module._Block, "__init__", note):
            file = self.storage.open("huge")
            file.read(5 * UNIT)
        self.assertGreater(len(blocks), 5)
        file.close()
        self.ends_its_threads()
        self.assertEqual([*blocks], [])
        kind = type("Weak", (Exception,), {})
        try:
            raise kind
        except kind as error:
            kept, file = weakref.ref(error), self.storage.open("new", "wb")
            file.close()
        gc.collect()
        self.assertIsNone(kept())


@unittest.skipUnless(hasattr(signal, "pthread_kill"), "needs POSIX's signals")
class LeavingTests(StorageTestCase):
    """Nobody waits for the requests of a stream that is gone."""

    def setUp(self):
        super().setUp()
        unittest.mock.patch.object(module, "time", time).start()
        self.addCleanup(unittest.mock.patch.stopall)
        # A shell lets what it runs in the background ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)

    @contextlib.contextmanager
    def at_once(self):
        begun = time.monotonic()
        yield
        self.assertLess(time.monotonic() - begun, 1)

    def reader(self, account):
        """A reader whose next blocks stall."""
        account.put("/big", HUGE)
        file = account.storage().open("big")
        file.read(5)
        account.stalling = ("files/download",)
        file.read(2 * UNIT - 5)
        return file

    def interrupted(self, act):
        """Ctrl-C while it waits."""
        main = threading.main_thread().ident
        timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with self.at_once(), self.assertRaises(KeyboardInterrupt):
            act()
        timer.join()

    def test_an_interrupt_while_it_waits_for_a_block(self):
        account = StallingAccount()
        file = self.reader(account)
        self.interrupted(file.read)
        self.assertEqual(account.waiting, account.storage().CONNECTIONS)
        with self.at_once():
            file.close()

    def test_seeking_away_from_blocks_that_stall(self):
        account = StallingAccount()
        file = self.reader(account)
        self.interrupted(file.read)
        account.stalling = ()
        with self.at_once():
            file.seek(9 * UNIT)
            self.assertEqual(file.read(9), HUGE[9 * UNIT :][:9])
            file.close()

    def test_a_stream_that_is_closed_meanwhile(self):
        self.account.put("/big", HUGE)
        file = self.storage.open("big")
        stream = file.file.raw
        stream.seek(9 * UNIT)

        def close():
            time.sleep(0.1)
            stream.close()

        self.account.fail("files/download", close)
        with self.assertRaises((DropboxStorageException, ValueError, AttributeError)):
            stream.read(9)

    def test_a_reader_that_the_garbage_collector_closes(self):
        """In whatever thread, with whatever lock: as here that of the refresh."""

        class Collecting(FakeAccount):
            collecting = False

            def token(self, form):
                if self.collecting:
                    time.sleep(0.3)  # so that those who fetch ahead wait for the lock
                    gc.collect()
                return super().token(form)

        account = Collecting()
        account.put("/big", HUGE)
        storage = account.storage(**REFRESHING)

        first = iter([0])

        class Slow(io.BytesIO):  # but for the first block
            def __init__(self, data):
                super().__init__(data)
                self.pause = next(first, 0.1)

            def read(self, *args):
                time.sleep(self.pause)
                return super().read(*args)

        def leave_open():
            field = models.FileField(storage=storage)
            file = FieldFile(None, field, "big").open()
            file.read(2 * UNIT)
            account.body = Slow
            file.read(UNIT)
            file.cycle = file

        gc.disable()
        self.addCleanup(gc.enable)
        leave_open()
        account.collecting = True
        account.fail("files/get_metadata", "expired_token")
        for name in ("a", "b"):
            thread = threading.Thread(target=storage.exists, args=name, daemon=True)
            thread.start()
            thread.join(5)
            self.assertFalse(thread.is_alive())

    def test_transfers_where_no_thread_can_be_started(self):
        full = RuntimeError("can't start new thread")
        self.storage = self.account.storage(**REFRESHING)
        with unittest.mock.patch.object(self.threads, "start_new_thread") as start:
            start.side_effect = full
            self.save("big", HUGE)
            self.assertTrue(self.storage.open("big").read() == HUGE)
        self.assertGreater(start.call_count, 9)

    def test_an_exception_of_ones_own(self):
        account = StallingAccount()
        account.stalling = ("files/upload_session/append_v2",)
        with self.at_once(), self.assertRaises(ZeroDivisionError):
            with account.storage().open("big", "wb") as file:
                file.write(HUGE)
                raise ZeroDivisionError
        with self.at_once(), self.assertRaises(ZeroDivisionError):
            account.storage().save("new", Broken(HUGE))

    def test_attempts_of_an_upload_end_with_it(self):
        self.account.fail("files/upload_session/append_v2", "503", times=999)
        with self.assertRaises(ZeroDivisionError):
            self.storage.save("new", Broken(HUGE))
        calls = sum(self.account.calls.values())
        self.ends_its_threads()
        self.assertLess(sum(self.account.calls.values()) - calls, 30)

    def test_an_interrupt_while_it_waits_for_a_chunk(self):
        account = StallingAccount()
        account.stalling = ("files/upload_session/append_v2",)
        file = account.storage().open("big", "wb")
        file.write(HUGE)
        self.interrupted(file.close)
        self.assertTrue(file.closed)

    def test_attempts_end_with_the_stream(self):
        self.account.put("/big", HUGE)
        self.storage.FIRST_WAIT = 1
        file = self.storage.open("big")
        file.read(2 * UNIT)
        self.account.fail("files/download", "503", times=999)
        self.interrupted(file.read)
        file.close()
        self.ends_its_threads()

    def test_the_interpreter_exits(self):
        code = """
sizes = small_sizes()
sizes.__enter__()
account = StallingAccount()
account.put("/big", HUGE)
storage = account.storage()
file = storage.open("big")
file.read(2 * UNIT)
account.stalling = ("files/download", "files/upload_session/append_v2")
content = ContentFile(HUGE)
for act in (file.read, lambda: storage.save("new", content)):
    threading.Thread(target=act, daemon=True).start()
while account.waiting < 4: time.sleep(0.01)
print("done")
"""
        self.assertEqual(run_python(code), "done\n")

    def test_transfers_at_exit_and_in_a_thread_that_outlives_the_main_one(self):
        code = """
import atexit
sizes = small_sizes()
sizes.__enter__()
account = FakeAccount()
storage = account.storage()
def transfer(name):
    time.sleep(0.2)
    storage.save(name, ContentFile(HUGE))
    print(storage.open(name).read() == account.files()["/" + name] == HUGE)
atexit.register(transfer, "one")
threading.Thread(target=transfer, args=["two"]).start()
"""
        self.assertEqual(run_python(code), "True\nTrue\n")


def under_each_quirk(**options):
    """Run a test with an account that has no quirk, with each of them, and with all."""

    def decorate(test):
        @functools.wraps(test)
        def run(self):
            for quirks in ((), *((quirk,) for quirk in QUIRKS), tuple(QUIRKS)):
                cache.clear()
                account = FakeAccount(page_size=3, quirks=quirks)
                with self.subTest(quirks=quirks):
                    test(self, account, account.storage(**options))

        return run

    return decorate


class QuirkTests(StorageTestCase):
    """All that matters works whatever the real Dropbox turns out to do."""

    @under_each_quirk()
    def test_replacing_with_the_same_bytes_and_with_others(self, account, storage):
        data = noise(9 * UNIT, 10)
        for mode in ("overwrite", "update"):
            storage.write_mode = mode
            for content in (b"a", b"a", data, data, b"b", b""):
                self.assertEqual(storage.save("a", ContentFile(content)), "a")
                self.assertTrue(account.files() == {"/a": content})
                account.entries.clear()
                account.put("/a", content, "2020-01-01T00:00:00Z")
                with storage.open("a", "wb") as file:
                    file.write(content)
                self.assertTrue(account.files() == {"/a": content})

    @under_each_quirk(write_mode="update")
    def test_update_refuses_what_has_changed(self, account, storage):
        for size in (1, 9 * UNIT):
            account.put("/a", b"old")
            with self.assertRaises(DropboxStorageException):
                with storage.open("a", "wb") as file:
                    file.write(bytes(size))
                    account.put("/a", b"theirs")
            self.assertEqual(account.files(), {"/a": b"theirs"})

    @under_each_quirk()
    def test_a_race_for_a_name(self, account, storage):
        data = noise(9 * UNIT, 11)
        for content in (b"", b"small", data):
            for theirs in (b"theirs", content):
                account.entries.clear()
                account.put("/a", theirs)
                name = storage._save("a", ContentFile(content))
                self.assertTrue(account.files() == {"/a": theirs, f"/{name}": content})
                with self.assertRaises(FileExistsError):
                    account.entries.clear()
                    with storage.open("a", "xb") as file:
                        file.write(content)
                        account.put("/a", theirs)
                self.assertTrue(account.files() == {"/a": theirs})

    @under_each_quirk()
    def test_reading_and_ranges(self, account, storage):
        text = noise(UNIT, 12)
        for size in (0, 1, 3 * UNIT, 13 * UNIT + 1):
            data = (text * (size // UNIT + 1))[:size]
            account.put("/a", data)
            with storage.open("a") as file:
                self.assertTrue(file.read() == data)
                for start in (0, size // 3, size - 1):
                    file.seek(max(0, start))
                    self.assertTrue(file.read(5) == data[max(0, start) :][:5])
                file.seek(size // 2)
                account.fail("files/download", "truncate")
                self.assertTrue(file.read() == data[size // 2 :])
                account.faults.clear()

    def test_what_is_compressed_all_the_same_is_an_error(self):
        class Compressing(FakeAccount):
            def send_file(self, metadata, data, request, fault):
                request.headers["Accept-Encoding"] = "gzip"
                return super().send_file(metadata, data, request, fault)

        closed = []

        class Body(io.BytesIO):
            def close(self):
                closed.append(self)
                super().close()

        account = Compressing(quirks=("gzip",))
        account.body = Body
        account.put("/a", b"0123456789" * UNIT)
        with self.assertRaisesRegex(DropboxStorageException, "found gzip"):
            account.storage().open("a")
        self.assertEqual(len(closed), account.calls["files/download"])

    @under_each_quirk()
    def test_waiting_for_as_long_as_dropbox_asks(self, account, storage):
        for fault in ("429", "429_text", "too_many_writes"):
            account.faults.clear()
            account.fail("files/get_metadata", fault, value=90)
            with self.assertRaisesRegex(
                DropboxStorageException, "Dropbox asks to wait 90 s, max_wait is 60"
            ):
                storage.exists("a")

    @under_each_quirk()
    def test_paper(self, account, storage):
        account.put("/a.paper", b"x")
        if "paper" in account.quirks:
            for use in (storage.open, storage.url):
                with self.assertRaisesRegex(DropboxStorageException, "Paper"):
                    use("a.paper")
            self.assertTrue(storage.exists("a.paper"))
            self.assertEqual(storage.size("a.paper"), 1)
        else:
            self.assertEqual(storage.open("a.paper").read(), b"x")

    @under_each_quirk()
    def test_saving_sizes_around_the_chunks(self, account, storage):
        chunk = storage.CHUNK_SIZE
        data = noise(3 * chunk + 1, 9)
        for size in (0, 1, *(n * chunk + d for n in (1, 2, 3) for d in (-1, 0, 1))):
            name = storage.save(f"{size}", ContentFile(data[:size]))
            self.assertTrue(account.files()[f"/{name}"] == data[:size])
        if "kept_sessions" not in account.quirks:
            self.assertEqual(account.sessions, {})

    @under_each_quirk()
    def test_looking_and_listing(self, account, storage):
        self.assertEqual(storage.listdir(""), ([], []))
        for i in range(4):
            account.put(f"/Dir/{i}", b"12345")
            account.put(f"/Dir/Sub/{i}")
        folders, files = storage.listdir("dir")
        self.assertEqual((folders, sorted(files)), (["Sub"], ["0", "1", "2", "3"]))
        self.assertEqual(storage.size("dir/1"), 5)
        self.assertTrue(storage.exists("DIR/sub/3"))
        self.assertFalse(storage.exists("dir/9"))
        self.assertIsInstance(storage.get_modified_time("dir/1"), datetime.datetime)
        self.assertEqual(account.links[storage.url("dir/1")], b"12345")
        storage.delete("dir")
        self.assertFalse(storage.exists("dir/1"))


NASTY = ("..", ".", "", "a", "\\", "e\u0301", "\xe9", "ß", "x y", "~", "COM1", "...")
names = st.lists(st.sampled_from(NASTY) | st.text(max_size=5), max_size=5).map("/".join)
names = names | st.text(max_size=20)
roots = st.sampled_from(["/", "/root", "/a/b", "/e\u0301"])


class NamePropertyTests(StorageTestCase):
    @hypothesis.given(name=names, root=roots)
    @hypothesis.settings(max_examples=200, deadline=None)
    def test_every_name_stays_below_the_root_or_is_refused(self, name, root):
        account = FakeAccount()
        storage = account.storage(root_path=root)
        try:
            saved = storage.save(name, ContentFile(b"x"))
        except (SuspiciousFileOperation, DropboxStorageException, IsADirectoryError):
            self.assertEqual(account.files(), {})
        else:
            root = unicodedata.normalize("NFC", root).rstrip("/")
            path = f"{root}/{saved}"
            self.assertEqual(account.files(), {path: b"x"})
            self.assertTrue(unicodedata.is_normalized("NFC", path))
            self.assertEqual(storage.open(name).read(), b"x")

    @hypothesis.given(
        name=st.text(min_size=1).filter(lambda name: name.strip(". \t\r\n"))
    )
    @hypothesis.settings(max_examples=200, deadline=None)
    def test_every_valid_name_can_be_saved(self, name):
        try:
            valid = self.storage.get_valid_name(name)
        except SuspiciousFileOperation:
            return
        self.assertIn(f"/{self.save(valid)}", self.account.files())


# By name, as hypothesis would spell out what is large.
CONTENTS = {"empty": b"", "small": b"one", "other": b"two", "large": LARGE}


class AccountMachine(RuleBasedStateMachine):
    """Any sequence of operations and faults leaves the account as it must be."""

    some = st.sampled_from(["a", "A", "b", "d/a", "D/b", "d/e\u0301", "d/\xe9"])
    contents = st.sampled_from(["empty", "small", "other", "large"])

    def __init__(self):
        super().__init__()
        cache.clear()
        self.account, self.model = FakeAccount(page_size=2), {}
        self.numbers = itertools.count()
        self.add = self.account.storage()
        self.overwrite = self.account.storage(write_mode="overwrite")
        self.update = self.account.storage(write_mode="update")

    def key(self, name):
        return "/" + unicodedata.normalize("NFC", name).lower()

    @contextlib.contextmanager
    def refusing(self, missing=None):
        """A permanent fault is reported and changes nothing, as is a missing file."""
        permanent = any(fault[1] in PERMANENT for fault in self.account.faults)
        try:
            yield
        except DropboxStorageException:
            assert permanent
        except FileNotFoundError:
            assert missing and missing not in self.model

    @rule(
        route=st.sampled_from(["*", "files/upload", "files/upload_session/finish"]),
        fault=st.sampled_from([f for f in TRANSIENT if f != "expired_token"]),
        nth=st.integers(1, 2),
        times=st.integers(1, 3),
    )
    def fail(self, route, fault, nth, times):
        self.account.faults.clear()
        self.account.fail(route, fault, nth, times)

    @rule(fault=st.sampled_from(PERMANENT), nth=st.integers(1, 3))
    def refuse(self, fault, nth):
        self.account.faults.clear()
        self.account.fail("*", fault, nth, 99)

    @rule()
    def recover(self):
        self.account.faults.clear()

    @rule(name=some, content=contents)
    def another_device_writes(self, name, content):
        self.account.put(f"/{name}", CONTENTS[content])
        self.model[self.key(name)] = CONTENTS[content]

    @rule(name=some, content=contents)
    def save(self, name, content):
        # Equal bytes, added in the same second, cannot be told apart.
        content = CONTENTS[content] + b"%d" % next(self.numbers)
        with self.refusing():
            saved = self.add.save(name, ContentFile(content))
            assert self.key(saved) not in self.model
            self.model[self.key(saved)] = content

    @rule(name=some, content=contents, mode=st.sampled_from(["overwrite", "update"]))
    def replace(self, name, content, mode):
        with self.refusing():
            assert getattr(self, mode).save(
                name, ContentFile(CONTENTS[content])
            ) == name_of(name)
            self.model[self.key(name)] = CONTENTS[content]

    @rule(name=some, content=contents, breaks=st.booleans())
    def write(self, name, content, breaks):
        with self.refusing(), contextlib.suppress(ZeroDivisionError):
            with self.add.open(name, "wb") as file:
                file.write(CONTENTS[content])
                assert not breaks or 1 / 0
            self.model[self.key(name)] = CONTENTS[content]

    @rule(name=some)
    def delete(self, name):
        with self.refusing():
            self.add.delete(name)
            self.model.pop(self.key(name), None)

    @rule(name=some)
    def look(self, name):
        key = self.key(name)
        with self.refusing(key):
            assert self.add.exists(name) == (key in self.model)
            assert self.add.size(name) == len(self.model[key])
            assert self.add.url(name) in self.account.links

    @rule(name=some)
    def read(self, name):
        with self.refusing(self.key(name)), self.add.open(name) as file:
            assert file.read() == self.model[self.key(name)]

    @rule()
    def list(self):
        with self.refusing():
            folders, files = self.add.listdir("")
            found = {self.key(name) for name in files}
            assert found == {key for key in self.model if "/" not in key[1:]}

    @invariant()
    def the_account_holds_what_it_must(self):
        files = self.account.files()
        assert {path.lower(): data for path, data in files.items()} == self.model


def name_of(name):
    return unicodedata.normalize("NFC", name)


class AccountMachineTests(unittest.TestCase):
    def test_any_sequence(self):
        some = hypothesis.settings(
            max_examples=40, stateful_step_count=30, deadline=None
        )
        run_state_machine_as_test(AccountMachine, settings=some)
