"""Tests for those who change dropbox_storage.

Of the fake Dropbox, of threads, memory and garbage, of random sequences, and of what the
real Dropbox may turn out to do.
"""

import _thread
import collections
import contextlib
import copy
import datetime
import functools
import gc
import gzip
import hashlib
import http.client
import io
import itertools
import json
import logging
import os
import pathlib
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import tracemalloc
import types
import unicodedata
import unittest
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import dropbox
import hypothesis
import requests
import urllib3
from django.core.cache import cache
from django.core.cache.backends.locmem import LocMemCache
from django.core.exceptions import (
    ImproperlyConfigured,
    SuspiciousFileOperation,
    ValidationError,
)
from django.core.files.base import ContentFile
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import models
from django.db.models.fields.files import FieldFile
from django.test import SimpleTestCase, override_settings
from django.views.debug import ExceptionReporter
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

import test_dropbox_storage
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
    answers,
    content_hash,
    expect,
    filled_account,
    module,
    noise,
    raised_by,
    run_python,
    setUpModule,
    tearDownModule,
    true_sizes,
)


class FakeDropboxTests(unittest.TestCase):
    """The fake does what Dropbox does: raw requests, and what the SDK makes of them."""

    # fmt: off
    requests = [  # route, argument, body, status, error_summary
        *(("get_metadata", argument, None, 400, None) for argument in (
            {"path": "a"}, {"path": ""}, {"path": "/"}, {}, [], {"path": "/a.txt", "new": 1}, {"path": "rev:12"},
        )),
        *(("get_metadata", {"path": path}, None, 409, "path/not_found") for path in (
            "rev:0123456789", "id:none", "ns:7/t.txt",
        )),
        ("get_metadata", {"path": "ns:42/t.txt"}, None, 200, None),
        ("get_metadata", {"path": "/A.txt"}, None, 200, None),
        ("get_metadata", {"path": "/" + "x" * 256}, None, 409, "path/malformed_path"),
        ("list_folder", {"path": "/"}, None, 400, None),
        ("list_folder", {"path": "dir"}, None, 400, None),
        ("list_folder", {"path": "", "limit": 0}, None, 400, None),
        ("list_folder", {"path": "", "limit": 1}, None, 200, None),
        ("list_folder", {"path": "", "recursive": "yes"}, None, 400, None),
        ("list_folder/continue", {"cursor": "none"}, None, 409, "reset"),
        ("list_folder/continue", {"cursor": ""}, None, 400, None),
        ("upload", {"path": "new"}, b"x", 400, None),
        *(("upload", {"path": "/new", **wrong}, b"x", 400, None) for wrong in (
            {"mode": "append"}, {"content_hash": "00"}, {"client_modified": "yesterday"},
        )),
        ("upload", {"path": "/new", "content_hash": "0" * 64}, b"x", 409, "content_hash_mismatch"),
        ("upload", {"path": "/a.txt"}, b"one", 200, None),
        ("upload", {"path": "/a.txt", "strict_conflict": True}, b"one", 409, "path/conflict/file"),
        ("upload", {"path": "/v1.0/file", "autorename": True}, b"two", 200, "/v1.0/file (1)"),
        ("upload", {"path": "/v1.0/x.tar.gz", "autorename": True}, b"two", 200, "/v1.0/x.tar (1).gz"),
        ("upload_session/start", {"session_type": "concurrent"}, b"x", 409, "concurrent_session_data_not_allowed"),
        ("upload_session/start", {"session_type": "concurrent", "close": True}, b"", 409,
         "concurrent_session_close_not_allowed"),
        ("upload_session/append_v2", {"cursor": {"session_id": "none", "offset": 0}}, b"x", 409, "not_found"),
        ("upload_session/append_v2", {"cursor": {"session_id": "none"}}, b"x", 400, None),
        ("upload_session/finish", {"cursor": {"session_id": "none", "offset": 0}, "commit": {"path": "/f"}}, b"", 409,
         "lookup_failed/not_found"),
        ("upload_session/finish", {"cursor": {"session_id": "none", "offset": 0}, "commit": {"path": "f"}}, b"", 400,
         None),
        ("delete_v2", {"path": "/none"}, None, 409, "path_lookup/not_found"),
        ("delete_v2", {"path": ""}, None, 400, None),
        ("move_v2", {"from_path": "/none", "to_path": "/x"}, None, 409, "from_lookup/not_found"),
        ("move_v2", {"from_path": "/a.txt", "to_path": "/dir/b.txt"}, None, 409, "to/conflict/file"),
        ("copy_v2", {"from_path": "/dir", "to_path": "/copy"}, None, 200, None),
        ("get_metadata", {"path": "/copy/b.txt"}, None, 200, None),
        ("move_v2", {"from_path": "/copy", "to_path": "/moved"}, None, 200, None),
        ("get_metadata", {"path": "/copy/b.txt"}, None, 409, "path/not_found"),
        ("get_quota", {}, None, 404, None),
    ]
    # fmt: on

    def setUp(self):
        self.account = FakeAccount(page_size=2)
        self.client = FakeDropbox(self.account)
        for name in "a.txt dir/b.txt team/t.txt v1.0/file v1.0/x.tar.gz".split():
            self.account.put(f"/{name}", b"one")

    def test_raw_requests(self):
        post = self.account.create_session().post
        for route, argument, body, status, said in self.requests:
            headers = {"Authorization": "Bearer valid-token"}
            data = json.dumps(argument)
            if body is not None or route == "download":
                headers["Dropbox-API-Arg"], data = data, body
            with self.subTest(route, argument=argument):
                url = f"https://content.dropboxapi.com/2/files/{route}"
                response = post(url, data=data, headers=headers)
                self.assertEqual(response.status_code, status, response.text)
                if status == 409:
                    summary = response.json()["error_summary"]
                    self.assertEqual(summary.rstrip("/."), said)
                elif said:
                    self.assertEqual(response.json()["path_display"], said)
        for token, status in (("", 400), (" ", 400), ("other", 401)):
            url = "https://api.dropboxapi.com/2/files/get_metadata"
            response = post(url, data="{", headers={"Authorization": f"Bearer {token}"})
            self.assertEqual(response.status_code, status)

    def refusal(self, method, *args, **kwargs):
        with self.assertRaises(dropbox.exceptions.DropboxException) as caught:
            getattr(self.client, method)(*args, **kwargs)
        return str(caught.exception)

    def test_ranges_revisions_and_ids(self):
        old = self.client.files_upload(b"0123456789", "/r")
        for wanted, content, found in (
            ("bytes=2-4", b"234", "bytes 2-4/10"), ("bytes=8-", b"89", "bytes 8-9/10"),
            ("bytes=-2", b"89", "bytes 8-9/10"), ("lines=1", b"0123456789", None),
        ):  # fmt: skip
            self.client._headers = {"Range": wanted}
            response = self.client.files_download("/r")[1]
            self.assertEqual(response.content, content)
            self.assertEqual(response.headers.get("Content-Range"), found)
        self.client._headers = {"Range": "bytes=10-"}
        self.assertIn("416", self.refusal("files_download", "/r"))
        self.client._headers = None
        update = dropbox.files.WriteMode.update
        self.client.files_upload(b"new", old.id, mode=update(old.rev))
        for path, content in ((f"rev:{old.rev}", b"0123456789"), (old.id, b"new")):
            self.assertEqual(self.client.files_download(path)[1].content, content)
        refused = self.refusal("files_upload", b"x", "/r", mode=update(old.rev))
        self.assertIn("'conflict'", refused)
        self.assertIn("upload_session_id", refused)

    def test_pages_and_their_end(self):
        page, names = self.client.files_list_folder(""), []
        while names.extend(entry.name for entry in page.entries) or page.has_more:
            page = self.client.files_list_folder_continue(page.cursor)
        self.assertEqual(names, ["a.txt", "dir", "team", "v1.0"])
        root = dropbox.common.PathRoot.namespace_id("42")
        team = self.client.with_path_root(root).files_list_folder("")
        self.assertEqual([entry.name for entry in team.entries], ["t.txt"])
        self.assertEqual(self.client.clone().files_get_metadata("/a.txt").size, 3)

    def test_upload_sessions(self):
        files, client = dropbox.files, self.client
        kind = files.UploadSessionType.concurrent
        session = client.files_upload_session_start(b"", session_type=kind).session_id
        cursor = files.UploadSessionCursor(session, 5)
        append = "files_upload_session_append_v2"
        self.assertIn("invalid_offset", self.refusal(append, b"x", cursor))
        cursor.offset = 4 * UNIT
        self.assertIn("invalid_data_size", self.refusal(append, b"x", cursor))
        client.files_upload_session_append_v2(b"end", cursor, close=True)
        self.assertIn("closed", self.refusal(append, bytes(4 * UNIT), cursor))
        cursor.offset, commit = 4 * UNIT + 3, files.CommitInfo("/a")
        finish = "files_upload_session_finish"
        self.assertIn("missing", self.refusal(finish, b"", cursor, commit))
        self.account.sessions[session].pieces[0] = bytes(4 * UNIT)
        done = client.files_upload_session_finish(b"", cursor, commit)
        self.assertEqual(done.size, cursor.offset)
        self.assertIn("not_found", self.refusal(finish, b"", cursor, commit))
        serial = client.files_upload_session_start(b"abc").session_id
        cursor = files.UploadSessionCursor(serial, 1)
        self.assertIn("correct_offset=3", self.refusal(append, b"x", cursor))

    def test_a_temporary_link_can_be_followed_for_four_hours(self):
        link = self.client.files_get_temporary_link("/a.txt").link
        self.assertEqual(self.account.follow(link), b"one")
        self.account.expire_links()
        for address in (link, f"{link}x"):
            with self.assertRaises(requests.HTTPError):
                self.account.follow(address)

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
                account.fail("*", "503", times=99)
                begun = time.monotonic()
                with self.assertRaises(DropboxStorageException):
                    before.exists("a")
                account.faults.clear()
                account.fail("*", "429", value=50)
                self.assertTrue(before.exists("a"))
                self.assertLess(time.monotonic() - begun, 2)
                other = FakeAccount()
                other.storage().save("b", ContentFile(b"y"))
                self.assertEqual(other.files(), {"/b": b"y"})
        with self.assertRaises(ImproperlyConfigured):
            DropboxStorage().exists("a")

    def test_the_mixin_gives_each_test_an_account(self):
        class UploadTests(FakeDropboxMixin, SimpleTestCase):
            def test_one(self):
                DropboxStorage().save("a", ContentFile(b"x"))
                self.assertEqual(self.account.files(), {"/a": b"x"})

            test_two = test_one

        result = unittest.TestResult()
        for name in ("test_one", "test_two"):
            UploadTests(name).run(result)
        self.assertEqual((result.testsRun, result.errors, result.failures), (2, [], []))

    def test_fail_refuses_what_it_does_not_know(self):
        with self.assertRaisesRegex(ValueError, "Unknown route 'files/uplaod'"):
            self.account.fail("files/uplaod", "503")
        with self.assertRaisesRegex(ValueError, "Unknown kind '5O3'"):
            self.account.fail("files/upload", "5O3")

    def test_a_busy_account_refuses_what_comes_meanwhile(self):
        account = FakeAccount(quirks=["busy"])
        storage = account.storage(max_wait=None)
        with ThreadPoolExecutor(4) as pool:
            contents = [ContentFile(b"x") for _ in range(12)]
            names = {*pool.map(storage.save, map(str, range(12)), contents)}
        self.assertEqual(len(names), 12)
        self.assertGreater(account.calls["files/upload"], 12)

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
    account.lock = contextlib.nullcontext()  # this lock, too, could stay locked
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

    names = ("late", *"0123456")
    late, *threads = [
        threading.Thread(target=work, args=[name], daemon=True) for name in names
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
    late.start()
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

    bytes_kept = 0

    def files_upload_session_append_v2(self, argument, body):
        time.sleep(0.01)  # so that those who do not wait pile up chunks
        with self.lock:
            self.bytes_kept += len(body)

    def files_upload_session_finish(self, argument, body):
        digest = hashlib.sha256(ZEROS).digest() * (self.bytes_kept // HASH_BLOCK)
        found = Entry("/big", b"", "0123456789", "2024-07-01T12:00:00Z", id="id:1")
        digest = hashlib.sha256(digest).hexdigest()
        return {**found.metadata(), "content_hash": digest, "size": self.bytes_kept}


ZEROS = bytes(4 * MiB)


class MemoryTests(StorageTestCase):
    """However large a file is, it is never in memory as a whole. At true size."""

    limit = 48 * MiB

    def setUp(self):
        super().setUp()
        self.enter(true_sizes())

    def peak(self, act):
        tracemalloc.start()
        try:
            act()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def test_saving(self):
        """What comes in pieces, with and without failures, and what comes in one."""
        pieces = Unsized()
        pieces.chunks = lambda: itertools.repeat(ZEROS[: 64 * 1024], 128 * 16)
        one = ContentFile(ZEROS * 32)
        for kind, content in (
            (None, pieces), ("503", pieces), ("reset", pieces), (None, one)
        ):  # fmt: skip
            account = SinkAccount()
            storage = account.storage()
            if kind:
                account.fail("files/upload_session/append_v2", kind, times=12)
            peak = self.peak(lambda: storage.save("big", content))
            self.assertEqual(account.bytes_kept, 128 * MiB)
            self.assertLess(peak, self.limit)

    def test_reading(self):
        """read() has the file in memory once, apart from the blocks."""
        self.account.put("/big", ZEROS * 32)
        for read, limit in (
            (lambda file: sum(map(len, file.chunks())), 0),
            (lambda file: len(file.read()), 128 * MiB * 9 // 8),
        ):

            def act(read=read):
                with self.storage.open("big") as file:
                    self.assertEqual(read(file), 128 * MiB)

            self.assertLess(self.peak(act), limit + self.limit)

    def test_chunks_and_blocks_have_the_sizes_that_are_documented(self):
        self.account.put("/big", ZEROS * 5)
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
            own = [one for one in gc.garbage if type(one).__module__ == module.__name__]
            return [*own, *(one for one in gc.garbage if isinstance(one, kinds))]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    def test_no_call_makes_a_cycle(self):
        for kind, times in ((None, 1), ("503", 1), ("503", 999), ("bad_input", 9)):
            storages = {}
            for operation, (options, _) in OPERATIONS.items():
                account = filled_account()
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

    def test_a_closed_file_keeps_no_content(self):
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


@unittest.skipUnless(hasattr(signal, "pthread_kill"), "needs POSIX's signals")
class LeavingTests(StorageTestCase):
    """Nobody waits for the requests of a stream that is gone."""

    def setUp(self):
        super().setUp()
        self.enter(unittest.mock.patch.object(module, "time", time))
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
        """Then, one can close the file, and seek away from the blocks that stall."""
        for seeks in (False, True):
            account = StallingAccount()
            file = self.reader(account)
            self.interrupted(file.read)
            self.assertEqual(account.waiting, account.storage().CONNECTIONS)
            account.stalling = ()
            with self.at_once():
                if seeks:
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
        self.assertRaises(DropboxStorageException, stream.read, 9)
        self.assertRaises(ValueError, stream.read, 9)
        self.ends_its_threads()

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
        for place, name in ((_thread, "start_new_thread"), (threading.Thread, "start")):
            with unittest.mock.patch.object(place, name, side_effect=full) as start:
                saved = self.save("big", HUGE)
                self.assertTrue(self.storage.open(saved).read() == HUGE)
            self.assertGreater(start.call_count, 9)

    def test_an_exception_while_it_waits_for_a_chunk(self):
        account = StallingAccount()
        account.stalling = ("files/upload_session/append_v2",)
        with self.at_once(), self.assertRaises(ZeroDivisionError):
            with account.storage().open("big", "wb") as file:
                file.write(HUGE)
                raise ZeroDivisionError
        with self.at_once(), self.assertRaises(ZeroDivisionError):
            account.storage().save("new", Broken(HUGE))
        file = account.storage().open("big", "wb")
        file.write(HUGE)
        self.interrupted(file.close)
        self.assertTrue(file.closed)

    def test_attempts_end_with_the_stream_or_the_upload(self):
        self.account.put("/big", HUGE)
        self.storage.FIRST_WAIT = 1
        file = self.storage.open("big")
        file.read(2 * UNIT)
        self.account.fail("*", "503", times=999)
        self.interrupted(file.read)
        file.close()
        self.ends_its_threads()
        self.account.faults.clear()
        self.account.fail("files/upload_session/append_v2", "503", times=999)
        with self.assertRaises(ZeroDivisionError):
            self.storage.save("new", Broken(HUGE))
        calls = sum(self.account.calls.values())
        self.ends_its_threads()
        self.assertLess(sum(self.account.calls.values()) - calls, 30)

    def test_the_interpreter_exits(self):
        code = """
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


def each_account():
    """An account that has no quirk, one with each of them, and one with all."""
    for quirks in ((), *((quirk,) for quirk in QUIRKS), tuple(QUIRKS)):
        cache.clear()
        yield FakeAccount(page_size=3, quirks=quirks)


class QuirkTests(StorageTestCase):
    """All that matters works whatever the real Dropbox turns out to do."""

    def test_what_is_tried_on_a_real_account(self):
        live = test_dropbox_storage.LiveTests
        for account in each_account():
            replaced = {"FakeAccount": lambda account=account: account, "LIVE": {}}
            replaced.update(MiB=UNIT, true_sizes=contextlib.nullcontext)
            result = unittest.TestResult()
            with contextlib.ExitStack() as stack:
                patch = unittest.mock.patch
                stack.enter_context(patch.multiple(test_dropbox_storage, **replaced))
                # A busy account needs true time: others commit in it.
                stack.enter_context(patch.object(module, "time", time))
                stack.enter_context(patch.object(DropboxStorage, "FIRST_WAIT", 0.02))
                live.setUpClass()
                for name in unittest.defaultTestLoader.getTestCaseNames(live):
                    live(name).run(result)
                live.doClassCleanups()
            with self.subTest(quirks=account.quirks):
                failed = result.errors + result.failures
                self.assertEqual("".join(text for _, text in failed), "")
                self.assertGreater(result.testsRun, 5)

    def test_a_race_for_a_name(self):
        contents = (b"", b"small", noise(9 * UNIT, 11))
        for account, content in itertools.product(each_account(), contents):
            storage = account.storage()
            for theirs in (b"theirs", content):
                with self.subTest(quirks=account.quirks, size=len(content)):
                    account.entries.clear()
                    account.put("/a", theirs)
                    name = storage._save("a", ContentFile(content))
                    files = {"/a": theirs, f"/{name}": content}
                    self.assertTrue(account.files() == files)
                    account.entries.clear()
                    with self.assertRaises(FileExistsError):
                        with storage.open("a", "xb") as file:
                            file.write(content)
                            account.put("/a", theirs)
                    self.assertTrue(account.files() == {"/a": theirs})

    def test_what_is_compressed_all_the_same_is_an_error(self):
        class Compressing(FakeAccount):
            def send_file(self, metadata, data, request, fault):
                request.headers["Accept-Encoding"] = "gzip"
                return super().send_file(metadata, data, request, fault)

        bodies = []

        def body(data):
            bodies.append(io.BytesIO(data))
            return bodies[-1]

        account = Compressing(quirks=("gzip",))
        account.body = body
        account.put("/a", b"0123456789" * UNIT)
        with self.fails("found gzip"):
            account.storage().open("a")
        self.assertTrue(bodies and all(body.closed for body in bodies))

    def test_paper(self):
        account = FakeAccount(quirks=["paper"])
        account.put("/a.paper", b"x")
        storage = account.storage()
        for use in (storage.open, storage.url):
            with self.fails("Paper"):
                use("a.paper")
        self.assertTrue(storage.exists("a.paper"))
        self.assertEqual(storage.size("a.paper"), 1)


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
            expect(permanent)
        except FileNotFoundError:
            expect(missing and missing not in self.model)

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
            expect(self.key(saved) not in self.model)
            self.model[self.key(saved)] = content

    @rule(name=some, content=contents, mode=st.sampled_from(["overwrite", "update"]))
    def replace(self, name, content, mode):
        with self.refusing():
            saved = getattr(self, mode).save(name, ContentFile(CONTENTS[content]))
            expect(saved == unicodedata.normalize("NFC", name))
            self.model[self.key(name)] = CONTENTS[content]

    @rule(name=some, content=contents, breaks=st.booleans())
    def write(self, name, content, breaks):
        with self.refusing(), contextlib.suppress(ZeroDivisionError):
            with self.add.open(name, "wb") as file:
                file.write(CONTENTS[content])
                expect(not breaks or 1 / 0)
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
            expect(self.add.exists(name) == (key in self.model))
            expect(self.add.size(name) == len(self.model[key]))
            expect(self.add.url(name) in self.account.links)

    @rule(name=some)
    def read(self, name):
        with self.refusing(self.key(name)), self.add.open(name) as file:
            expect(file.read() == self.model[self.key(name)])

    @rule()
    def list(self):
        with self.refusing():
            folders, files = self.add.listdir("")
            found = {self.key(name) for name in files}
            expect(found == {key for key in self.model if "/" not in key[1:]})

    @invariant()
    def the_account_holds_what_it_must(self):
        files = self.account.files()
        expect({path.lower(): data for path, data in files.items()} == self.model)


class AccountMachineTests(unittest.TestCase):
    def test_any_sequence(self):
        sizes = {"max_examples": 40, "stateful_step_count": 30}
        some = hypothesis.settings(**sizes, deadline=None)
        run_state_machine_as_test(AccountMachine, settings=some)


class FailureTests(StorageTestCase):
    """What is no answer of Dropbox's, and what comes from elsewhere."""

    def test_errors_that_are_made_up_with_mocks(self):
        for mock in (unittest.mock.Mock(), unittest.mock.MagicMock(), None, "text"):
            error = dropbox.exceptions.ApiError("id", mock, "text", "en")
            method = (dropbox.Dropbox, "files_get_metadata")
            message = f"files/get_metadata of '/a' failed: ApiError {error}."
            with unittest.mock.patch.object(*method, side_effect=error):
                with self.raises(DropboxStorageException, message):
                    self.storage.exists("a")

    def test_an_error_keeps_what_was_being_handled_before(self):
        def fail():
            kept = "its variables, too"
            raise KeyError(kept)

        try:
            fail()
        except KeyError as before:
            with self.refused("*", "bad_input") as caught:
                self.storage.exists("a")
            self.assertIs(caught.exception.__context__, before)
            self.assertIn("kept", before.__traceback__.tb_next.tb_frame.f_locals)

    def test_of_a_refusal_a_part_is_read(self):
        bomb = gzip.compress(bytes(50 * MiB))
        for body, encoding in ((b"x" * MiB, "identity"), (bomb, "gzip")):
            fault = answers(400, body, **{"content-encoding": encoding})
            tracemalloc.start()
            with self.refused("files/get_metadata", fault) as caught:
                self.storage.exists("a")
            self.assertLess(tracemalloc.get_traced_memory()[1], 8 * MiB)
            tracemalloc.stop()
            self.assertEqual(len(caught.exception.__cause__.body), 64 * 1024)

    def test_a_cause_holds_no_request_and_no_frame(self):
        self.storage.max_wait = 0
        for kind in ("reset", "stall", "bad_input"):
            with self.refused("*", kind) as caught:
                self.save("a")
            cause = caught.exception.__cause__
            if kind == "bad_input":
                self.assertIsNone(cause.__traceback__)
                self.assertIsNone(cause.__context__)
                names = {"request_id", "status_code", "body"}
                self.assertEqual({*vars(cause)}, names)
            else:
                self.assertIsNone(cause)
                self.assertIsNone(caught.exception.__context__)

    def test_the_password_of_a_proxy_is_shown_nowhere(self):
        proxy = "http://user:pass%40word@proxy.example:3128"
        for error in (
            requests.exceptions.ProxyError(f"cannot connect to {proxy}"),
            requests.exceptions.InvalidProxyURL(proxy),
            urllib3.exceptions.LocationParseError(proxy),
        ):
            with unittest.mock.patch.dict(os.environ, HTTPS_PROXY=proxy):
                with self.assertLogs("dropbox_storage") as logs:
                    with self.refused("*", raised_by("urllib3.x", error), times=99):
                        self.storage.exists("a")
            shown = f"{logs.output}"
            self.assertIn(type(error).__name__, shown)
            self.assertNotIn("pass%40word", shown)

    def test_what_comes_from_elsewhere_passes_through(self):
        """What a hook, a bug or a time limit raises is known by its innermost frame."""
        builtin = (ValueError, KeyError, TypeError, AssertionError, RecursionError)
        for kind in builtin:
            for package in ("dropbox.files", "stone.x", "requests.x", "json.decoder"):
                with self.failing("*", raised_by(package, kind("x"))):
                    self.assertFalse(self.storage.exists("a"))
        self.clock.pauses.clear()
        others = (TimeoutError, ValidationError, KeyboardInterrupt, OSError)
        derived = [
            type("Limit", (kind,), {"__init__": lambda self: None})()
            for kind in (*builtin, OSError, UnicodeDecodeError)
        ]
        errors = [kind("x") for kind in builtin + others] + derived
        packages = itertools.cycle(("celery.timers", "dropboxlike", __name__))
        faults = [(raised_by(next(packages), error), error) for error in errors]
        for error in (MemoryError(), derived[0]):
            faults.append((raised_by("dropbox.files", error), error))
        (_, first), (_, second), *_ = faults
        first.__cause__ = second  # a cycle, which two `raise ... from` can make
        second.__cause__ = first
        for fault, error in faults:
            with self.subTest(repr(error)), self.failing("*", fault):
                with self.assertRaises(type(error)) as caught:
                    self.storage.exists("a")
                self.assertIs(caught.exception, error)
        self.assertEqual(self.clock.pauses, [])

    def test_certificates_and_proxies_are_reported_at_once(self):
        bundle = OSError("Could not find a suitable TLS CA certificate bundle")
        connect = "HTTPSConnectionPool(host='x', port=443): Max retries exceeded"
        verify = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"
        tunnel = "OSError('Tunnel connection failed: 407 Proxy Authentication Needed')"
        for error, told in (
            (bundle, f"OSError {bundle}"),
            (requests.exceptions.SSLError(f"{connect} {verify}"),
             f"SSLError {connect} {verify} (set REQUESTS_CA_BUNDLE to the CAs of your "
             "network)"),
            (requests.exceptions.ProxyError(tunnel),
             f"ProxyError {tunnel} (the proxy refuses; check its user and password)"),
            (requests.exceptions.InvalidProxyURL("http://user:secret@[x"),
             "InvalidProxyURL bad address (check HTTPS_PROXY and the like: "
             "http://user:password@host:port, where special characters of the password are "
             "written as %XX; socks5:// needs PySocks)"),
            (requests.exceptions.InvalidHeader("Bearer secret"),
             "InvalidHeader bad header (a token or header of the client is no printable ASCII)"),
            (UnicodeEncodeError("latin-1", "\u0142", 0, 1, "ordinal not in range(256)"),
             "UnicodeEncodeError 'latin-1' codec can't encode character '\\u0142' in position 0: "
             "ordinal not in range(256)"),
        ):  # fmt: skip
            message = f"files/get_metadata of '/a' failed: {told}."
            with self.failing("*", raised_by("requests.adapters", error)):
                with self.raises(DropboxStorageException, message) as caught:
                    self.storage.exists("a")
            self.assertEqual(self.clock.pauses, [])
            self.assertFalse(caught.exception.temporary)
            self.assertEqual(caught.exception.reason, type(error).__name__)


class Unprintable(str):
    def __repr__(self):
        raise ZeroDivisionError


class SecretTests(StorageTestCase):
    secrets = {"app_key": "hidden-key", "app_secret": "hidden-secret"}
    secrets["oauth2_access_token"] = "sl.hidden-access"
    secrets["oauth2_refresh_token"] = "hidden-refresh"

    def test_no_repr_and_no_log_shows_a_secret(self):
        with self.assertLogs(level="DEBUG") as logs:
            storage = self.account.connect(DropboxStorage(**self.secrets))
            storage.FIRST_WAIT = 0.001
            owner = ("hidden-key", "hidden-secret")
            self.account.refresh_tokens["hidden-refresh"] = owner
            self.account.tokens.add("sl.hidden-access")
            self.save("a", b"x", storage)
            self.account.fail("*", "503", times=3)
            self.assertIn("/a", self.account.files())
            shown = [repr(storage), str(storage), repr(storage.open("a"))]
            logging.getLogger().debug("at least one")
        self.assertNotIn("hidden", "".join([*shown, *logs.output]))

    def test_no_error_shows_a_secret_that_dropbox_repeats(self):
        quoted = (
            "hidden-access",
            '"hidden-access"',
            r"hidden\access",
            "hidden-access\n",
        )
        for token in (*quoted, "\u0142hidden-access", "hidden-access\x7f"):
            storage = DropboxStorage()
            storage.client = client = FakeDropbox(self.account)
            client._oauth2_access_token = token
            text = f'Invalid value in HTTP header "Authorization": "Bearer {token}"'
            for answer in (text, json.dumps({"error": text})):
                self.account.refused = Refused(400, answer)
                with self.assertRaises(DropboxStorageException) as caught:
                    storage.exists("a")
                error = caught.exception
                shown = "".join(traceback.format_exception(None, error, None))
                self.assertIn("DropboxStorageException", shown)
                self.assertNotIn("hidden", shown)
                if error.__cause__:  # Dropbox has answered
                    self.assertNotIn("hidden", repr(vars(error.__cause__)))

    def debug_page(self, act):
        """An error and what Django's debug page, and its mail to ADMINS, show of it.

        That is what the frames of the error and its causes hold, but for those of the
        tests: only FakeAccount.answer() stands for urllib3.
        """
        try:
            act()
        except Exception as error:
            shown = (None, type(error), error, error.__traceback__)
            with override_settings(DEBUG=True):
                frames = ExceptionReporter(*shown).get_traceback_frames()
            shown = [
                repr(frame.get("vars"))
                for frame in frames
                if frame.get("filename") not in (__file__, str(HERE))
                or frame.get("function") == "answer"
            ]
            self.assertTrue(shown)
            return error, f"{error!r} {error.__cause__!r} {shown}"
        self.fail("no error")

    def test_no_debug_page_shows_a_secret(self):
        """Of any operation under any kind of failure: its frames are shown with all they hold."""
        names = [name for name in module.CREDENTIALS if "access" not in name]
        secrets = {name: f"{os.urandom(9).hex()}-{name}" for name in names}
        values = [*secrets.values()]

        class TimeLimit(Exception):
            pass

        def limit():
            raise TimeLimit

        kinds = ("503", "reset", "garbage", "missing_scope", limit)
        some = ("save", "save large", "append", "read huge", "exists", "delete", "link")
        for operation, fault in itertools.product(some, kinds):
            options, act = OPERATIONS[operation]
            options = {**options, "oauth2_access_token": None, **secrets}
            account = filled_account()
            account.refresh_tokens = {values[0]: tuple(values[1:])}
            storage, clean = account.storage(**options), account.storage(**options)
            with account.counting() as calls:
                act(clean)
            account.entries.pop("/new", None)
            for route in calls:
                cache.clear()
                account.put("/a", b"old")
                account.faults.clear()
                account.fail(route, fault, times=999)
                with self.subTest(f"{operation}: {route} {fault}"):
                    error, page = self.debug_page(lambda: act(storage))
                    self.assertIsInstance(error, (DropboxStorageException, TimeLimit))
                    for secret in (*values, *account.tokens):
                        self.assertFalse(secret in page)

    def test_no_debug_page_shows_a_secret_that_cannot_be_used(self):
        secret = os.urandom(9).hex()
        access = {"oauth2_access_token": secret}
        for options, missing, kind in (
            ({**access, "root_path": "relative"}, {}, ImproperlyConfigured),
            ({**access, "unknown": 1}, {}, ImproperlyConfigured),
            ({"oauth2_access_token": f"{secret} "}, {}, ImproperlyConfigured),
            ({"oauth2_refresh_token": f"sl.{secret}"}, {}, ImproperlyConfigured),
            ({"app_secret": secret, "timeout": 0}, {}, ImproperlyConfigured),
            ({"oauth2_refresh_token": secret, "app_secret": secret}, {}, ImproperlyConfigured),
            ({"oauth2_refresh_token": "***", "app_secret": secret}, {}, ImproperlyConfigured),
            (access, {"dropbox": None}, ImportError),
        ):  # fmt: skip
            with unittest.mock.patch.dict(sys.modules, missing):
                error, page = self.debug_page(
                    lambda: DropboxStorage(**options).exists("a")
                )
            self.assertIsInstance(error, kind)
            self.assertFalse(secret in page, options)

    def test_no_debug_page_shows_a_secret_of_the_client_that_is_used_directly(self):
        secrets = {name: os.urandom(9).hex() for name in module.CREDENTIALS}
        secrets["oauth2_access_token"] = None
        account = FakeAccount()
        refresh, _, *app = secrets.values()
        account.refresh_tokens = {refresh: tuple(app)}
        with self.mounted(account):
            storage = DropboxStorage(**secrets)
            for route in ("oauth2/token", "files/list_folder"):
                for fault in ("503", "reset", "garbage", "missing_scope"):
                    account.faults.clear()
                    account.fail(route, fault, times=9)
                    _, page = self.debug_page(
                        lambda: storage.client.files_list_folder("")
                    )
                    for secret in (refresh, *app, *account.tokens):
                        self.assertFalse(secret in page, (route, fault))

    def test_what_a_migration_holds_in_place_of_credentials(self):
        class Tenant(DropboxStorage):
            def __init__(self, accounts, folder, *more):
                super().__init__(**accounts[0], root_path=folder)

        class Renamed(DropboxStorage):
            def __init__(self, secret, folder, nothing=None):
                super().__init__(secret, root_path=folder)

        class Named(DropboxStorage):
            def __init__(self, folder, app_secret, *more):  # which is none
                super().__init__(root_path=folder)

        class Hidden(DropboxStorage):
            oauth2_access_token = property(lambda self: 1 / 0)

        class Computed(DropboxStorage):
            oauth2_access_token = property(lambda self: self.account["token"])

            def __init__(self, account):
                self.account = account
                super().__init__()

        class Address(DropboxStorage):
            def __init__(self, url):
                super().__init__(url.rpartition("@")[0].rpartition("/")[2])

        keywords = {k: v for k, v in self.secrets.items() if "access" not in k}
        hidden = dict.fromkeys(self.secrets, "***")
        nested = {"deep": [keywords["app_secret"]]}
        replaced = DropboxStorage("hidden-1", root_path="/r")
        renamed = Renamed("hidden-1", "/r", None)
        for storage in (replaced, renamed):
            storage.oauth2_access_token = "hidden-2"
        failing = Computed({"token": "hidden-token"})
        failing.account = {}  # the property fails, as it may outside a web request
        for storage, args, kwargs in (
            (Tenant([keywords], "/x", nested, "/y"), ("***", "/x", "***", "/y"), {}),
            (Renamed("hidden-1", folder="/y"), ("***",), {"folder": "/y"}),
            (Computed({"token": "hidden-token"}), ("***",), {}),
            (Address("dropbox://hidden-token@media"), ("***",), {}),
            (failing, ({"token": "hidden-token"},), {}),
            (replaced, ("***",), {"root_path": "/r"}),
            (renamed, ("***", "/r", None), {}),
            (Named("/r", "hidden-1", "more"), ("/r", "hidden-1", "more"), {}),
            (Hidden("hidden-1", root_path="/r"), ("***",), {"root_path": "/r"}),
            (DropboxStorage("hidden-1", base_url=Unprintable()), ("***",),
             {"base_url": "***"}),
            (DropboxStorage(**self.secrets, root_path="/r"), (), {**hidden, "root_path": "/r"}),
            (DropboxStorage("hidden", **keywords), ("***",), dict.fromkeys(keywords, "***")),
            (DropboxStorage(timeout=None), (), {"timeout": None}),
            (DropboxStorage("", app_key=None), ("",), {"app_key": None}),
        ):  # fmt: skip
            self.assertEqual(storage._constructor_args, (args, kwargs))

    def test_no_frame_shows_content(self):
        """Of any read or upload that fails: its frames are shown with all they hold."""
        secret = b"confidential!"
        content = secret * (20 * UNIT // len(secret))
        self.account.put("/a", content)
        self.account.put("/small", secret)
        self.storage.max_wait = 0

        def read(name, mode, size):
            with self.storage.open(name, mode) as file:
                file.read(5)
                kind = "truncate" if size < 0 else "503"
                self.account.fail("files/download", kind, times=99)
                file.seek(4 * UNIT)
                file.read(size)

        def freed():
            kept = [bytearray(content) for _ in range(9)]
            del kept  # CPython's readinto() takes this memory
            with self.storage.open("a") as file:
                self.account.fail("files/download", "503", times=99)
                file.seek(9 * UNIT)
                file.file.raw.read(9 * UNIT)

        def save(content, kind="503"):
            self.account.fail("files/upload", kind, times=99)
            self.account.fail("files/upload_session/append_v2", kind, times=99)
            self.storage.save("new", content)

        def write(mode, content):
            file = self.storage.open("a", mode)
            file.write(content)
            self.account.fail("*", "bad_input", times=99)
            file.close()

        half = secret.decode() + "\ud800" + secret.decode()
        uploaded = SimpleUploadedFile("a", content)
        for act, *args in (
            (read, "a", "rb", -1), (read, "a", "rb", 9), (read, "a", "r", -1), (read, "a", "r", 9), (freed,),
            (save, ContentFile(content)), (save, ContentFile(secret)), (save, ContentFile(secret), "bad_input"),
            (save, ContentFile(content.decode())), (save, uploaded), (save, uploaded, "bad_input"),
            (save, ContentFile(half)), (save, Unsized(secret, half)),
            (write, "wb", content), (write, "ab", secret), (write, "r+", f"new {secret.decode()}"),
        ):  # fmt: skip
            self.account.faults.clear()
            with self.subTest(act=act, args=args):
                _, page = self.debug_page(lambda: act(*args))
                self.assertNotIn("confidential", page)
                self.assertLess(len(page), 40_000)


def holds_in_a_forked_process(condition):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork
        child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            status = 0 if condition() else 2
        os._exit(status)
    return os.waitpid(child, 0)[1] == 0


class ProcessTests(StorageTestCase):
    """What the storages of a process share."""

    def test_copies_and_pickles_share_the_client(self):
        storage = DropboxStorage("valid-token", root_path="/r")
        for copied in (copy.deepcopy(storage), pickle.loads(pickle.dumps(storage))):
            self.assertEqual(copied.deconstruct(), storage.deconstruct())
            self.assertIs(copied.client.owner, storage.client.owner)
            name = self.save("a.txt", b"x", copied)
            self.assertIn(f"/r/{name}", self.account.files())

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_a_forked_process_builds_its_own_client(self):
        self.storage = DropboxStorage("valid-token")
        self.storage.exists("a.txt")
        parent = id(self.storage.client.owner)

        def has_its_own():
            self.storage.exists("a.txt")
            return id(self.storage.client.owner) != parent

        self.assertTrue(holds_in_a_forked_process(has_its_own))
        self.assertEqual(id(self.storage.client.owner), parent)

    def test_costly_imports_come_with_the_first_request(self):
        code = (
            "from django.conf import settings; settings.configure(); import sys\n"
            f"from {module.__name__} import DropboxStorage; DropboxStorage('token')\n"
            "costly = {'dropbox', 'requests', 'django.http', 'django.db.models'}\n"
            "print(costly & sys.modules.keys())\n"
        )
        folder = pathlib.Path(module.__file__).resolve().parent
        self.assertEqual(run_python(code, folder), "set()\n")

    def test_an_assigned_client_closes_its_connections_once_in_each_process(self):
        """However many storages share it: a forked process needs connections of its own."""
        client = FakeDropbox(self.account)
        with unittest.mock.patch.object(self.account, "close") as closed:
            for process in (1, 2):
                with unittest.mock.patch.object(os, "getpid", lambda: process):
                    for _ in range(20):
                        storage = DropboxStorage()
                        storage.client = client
                        storage.exists("a.txt")
                        self.assertIs(storage.client, client)
                self.assertEqual(closed.call_count, process)

    def test_tenants_that_take_turns_keep_their_clients(self):
        tenants = ("one", "two", "three")

        class Tenants(DropboxStorage):
            tenant = asked = None
            app_key, app_secret = "app-key", "app-secret"

            @property
            def oauth2_refresh_token(self):
                self.asked.append(self.tenant)
                return f"refresh-{self.tenant}"

        storage = Tenants()
        storage.asked = []
        for tenant in tenants:
            self.account.refresh_tokens[f"refresh-{tenant}"] = ("app-key", "app-secret")
        for storage.tenant in tenants * 7:
            storage.exists("a")
        self.assertEqual(self.account.calls["oauth2/token"], 3)
        self.assertEqual(storage.asked, [*tenants * 7])  # once for each request
        clients = weakref.WeakSet()
        with unittest.mock.patch.object(module, "KEPT_CLIENTS", 5):
            for number in range(20):
                storage.tenant = f"{number}"
                clients.add(storage.client.owner)
                storage.tenant = "0"  # is used again and again, and stays
                clients.add(storage.client.owner)
            gc.collect()
            self.assertEqual(len(clients), 5)
            self.assertIn(storage.client.owner, clients)

    def refreshing(self, number, **options):
        """A new storage for the account with that number, whose token must be fetched."""
        token = f"refresh-{number}"
        self.account.refresh_tokens[token] = ("app-key", "app-secret")
        options = {**REFRESHING, "oauth2_refresh_token": token, **options}
        return DropboxStorage(**options)

    def test_forty_accounts_fetch_forty_tokens_and_share_their_connections(self):
        for _ in range(3):
            for number in range(40):
                self.refreshing(number).exists("a")
        expected = {"oauth2/token": 40, "files/get_metadata": 120}
        self.assertEqual(self.account.calls, expected)
        clients = [self.refreshing(number).client.owner for number in range(3)]
        self.assertEqual(len({id(client) for client in clients}), 3)
        self.assertEqual(len({id(client._session) for client in clients}), 1)
        other = self.refreshing(1, timeout=7).client
        self.assertEqual((other._timeout, clients[1]._timeout), (7, 100))

    def test_a_session_keeps_no_cookies_and_no_netrc_replaces_the_token(self):
        class Setting(FakeAccount):
            def send(self, request, **kwargs):
                self.cookie = request.headers.get("Cookie")
                response = super().send(request, **kwargs)
                message = http.client.HTTPMessage()
                message["Set-Cookie"] = "name=value; Path=/"
                original = types.SimpleNamespace(msg=message, isclosed=lambda: True)
                response.raw._original_response = original
                return response

        account = Setting()
        with tempfile.TemporaryDirectory() as folder, self.mounted(account):
            netrc = pathlib.Path(folder, "netrc")
            netrc.write_text("default login user password secret", encoding="utf-8")
            with unittest.mock.patch.dict(os.environ, NETRC=str(netrc)):
                for name in ("a", "b"):  # a cookie would come with the first answer
                    DropboxStorage("valid-token").save(name, ContentFile(b"x"))
            authorization = account.last_headers["Authorization"]
            self.assertEqual(authorization, "Bearer valid-token")
            self.assertIsNone(account.cookie)

    def test_proxies_and_certificates_are_looked_up_once(self):
        """requests looks into the environment for each request."""
        asked = []

        class Asking(FakeAccount):
            def send(self, request, stream, timeout, verify, cert, proxies):
                proxy = requests.utils.select_proxy(request.url, proxies)
                asked.append((verify, proxy))
                return super().send(request, stream, timeout)

        environment = {"HTTPS_PROXY": "http://proxy:1", "REQUESTS_CA_BUNDLE": "/ca.pem"}
        for more, proxy in (
            ({}, "http://proxy:1"),
            ({"NO_PROXY": ".dropboxapi.com"}, None),
            ({"HTTPS_PROXY": "", "ALL_PROXY": "http://all:1"}, "http://all:1"),
        ):
            with self.mounted(Asking()):
                asked.clear()
                storage = DropboxStorage("valid-token")
                with unittest.mock.patch.dict(os.environ, {**environment, **more}):
                    storage.exists("a")
                storage.save("a", ContentFile(b"x"))
                self.assertEqual(asked, [("/ca.pem", proxy)] * 2)

    def test_hooks_of_an_assigned_client_are_called_and_left_as_they_are(self):
        seen = []

        def note(response, **kwargs):
            seen.append(response.status_code)

        for hooks in ({}, {"response": note}, {"response": [note]}, {"response": []}):
            client = FakeDropbox(self.account)
            client._session.hooks = copy.deepcopy(hooks)
            self.storage.client = client
            self.assertFalse(self.storage.exists("a"))
            self.assertEqual(client._session.hooks, hooks)
        self.assertEqual(seen, [409, 409])


class CommitTests(StorageTestCase):
    """Chunks, hashes, and responses that are lost."""

    def test_chunks_of_any_size_fit_into_a_request(self):
        class Small(FakeAccount):  # as if 12 UNIT were all that a request may carry
            def check_hash(self, argument, body):
                expect(len(body) <= 12 * UNIT)
                super().check_hash(argument, body)

        data = noise(30 * UNIT + 1, 8)
        for size in (1, 5 * UNIT, 75 * UNIT, 150 * UNIT, 1000 * UNIT):
            account = Small()
            storage = account.storage()
            storage.CHUNK_SIZE = size
            with unittest.mock.patch.object(module, "MAX_REQUEST", 12 * UNIT):
                for end in (9 * UNIT, 13 * UNIT, len(data)):
                    name = storage.save("a", ContentFile(data[:end]))
                    self.assertTrue(account.files()[f"/{name}"] == data[:end])
            self.assertEqual(len(account.sessions), 0)

    def test_a_dead_dropbox_is_waited_for_once(self):
        for size in (5, len(LARGE)):
            self.new_account()
            for route in ("files/upload", "files/upload_session/finish"):
                die = functools.partial(self.account.fail, "*", "503", times=999)
                self.account.fail(route, die)
            self.clock.pauses.clear()
            with self.assertRaises(DropboxStorageException):
                self.storage._save("a", ContentFile(LARGE[:size]))
            self.assertEqual(self.account.calls["files/get_metadata"], 1)
            self.assertLess(sum(self.clock.pauses), 61)

    def test_a_chunk_that_is_lost_and_then_refused_has_not_arrived(self):
        append = "files/upload_session/append_v2"
        self.account.fail(append, "503")
        self.account.fail(append, "session_lost", times=2)
        self.storage.CONNECTIONS = 1
        with self.assertRaisesRegex(DropboxStorageException, f"^{append} of") as caught:
            self.save("a", HUGE)
        self.assertEqual(caught.exception.reason, "not_found")
        self.holds({})


class LinkCacheTests(StorageTestCase):
    """What the cache of links holds, whatever happens meanwhile."""

    def test_no_link_to_an_old_file_is_kept_however_all_interleave(self):
        """A writer and a second reader come at each step of a first reader."""

        def stepping(method):
            def call(self, *args, **kwargs):
                self.step()
                return getattr(super(Stepping, self), method)(*args, **kwargs)

            return call

        class Stepping(LocMemCache):
            step = staticmethod(lambda: None)
            get, add, set, delete = map(stepping, ("get", "add", "set", "delete"))

        storage = self.account.storage(write_mode="overwrite")
        backend = Stepping("stepping", {})
        with unittest.mock.patch.object(module, "caches", {"default": backend}):
            for writing, reading in itertools.product(range(8), range(8)):
                backend.clear()
                self.account.put("/a", b"old")
                due = {writing: lambda: self.save("a", b"new", storage)}
                steps = itertools.count()

                def step(due=due, steps=steps):
                    backend.step = lambda: None
                    for act in (due.get(number := next(steps)), reader.get(number)):
                        if act:
                            act()
                    backend.step = step

                reader = {reading: lambda: storage.url("a")}
                self.account.fail("files/get_temporary_link", step)
                backend.step = step
                storage.url("a")
                backend.step = lambda: None
                if next(steps) <= writing:
                    due[writing]()
                with self.subTest(writing=writing, reading=reading):
                    link = storage.url("a")
                    self.assertEqual(self.account.links[link], b"new")
            self.assertGreater(next(steps), 4)

    def test_the_link_of_a_busy_file_is_kept(self):
        """A newcomer, who asks while the link is being made, does not hinder that."""
        storage, arrived, leave = self.storage, threading.Event(), threading.Event()

        class Busy(FakeAccount):
            def answer(self, route, *args):
                if route == "files/get_temporary_link" and not arrived.is_set():
                    if threading.current_thread() is newcomer:
                        arrived.set()
                        leave.wait(5)
                    else:
                        newcomer.start()
                        arrived.wait(5)
                return super().answer(route, *args)

        newcomer = threading.Thread(target=lambda: storage.url("a b.txt"))
        self.account = Busy()
        self.account.put("/a b.txt", b"12345")
        self.account.connect(storage)
        link = storage.url("a b.txt")
        self.assertTrue(newcomer.is_alive())
        self.assertEqual(storage.url("a b.txt"), link)
        leave.set()
        newcomer.join(5)
        self.assertEqual(self.account.calls["files/get_temporary_link"], 2)


class StalledTokenTests(StorageTestCase):
    """The token endpoint stalls: only what needs a new token waits, and not for long."""

    def setUp(self):
        super().setUp()
        self.enter(unittest.mock.patch.object(module, "time", time))

        class Stalling(FakeAccount):
            stalls, release = False, threading.Event()

            def token(self, form):
                if self.stalls:
                    self.release.wait(3)
                    raise Refused(503, "stalled")
                return super().token(form)

        self.account = Stalling()
        self.account.release.clear()
        self.addCleanup(self.account.release.set)
        self.account.put("/a", LARGE)
        self.storage = self.account.storage(**REFRESHING, timeout=0.5, max_wait=0)
        self.link, self.file = self.storage.url("a"), self.storage.open("a")
        self.file.read(5)
        self.account.stalls = True

    def stalled(self, count):
        """Threads that need a new token."""
        pool = ThreadPoolExecutor(count)
        self.addCleanup(pool.shutdown)
        futures = [pool.submit(self.storage.exists, "a") for _ in range(count)]
        time.sleep(0.1)
        return futures

    def test_threads_wait_together(self):
        """For one refresh, and for no longer than the timeout."""
        self.account.expire_tokens()
        self.storage.client._oauth2_access_token_expiration = None
        begun = time.monotonic()
        with self.account.counting() as calls:
            for future in self.stalled(8):
                error = future.exception()
                self.assertIsInstance(error, DropboxStorageException)
                self.assertTrue(error.temporary)
            # An attempt may take 0.5 s for each of two addresses, and then for the answer.
            self.assertLess(time.monotonic() - begun, 2)
            self.assertIn("token refresh timed out", str(error))
            self.account.release.set()
            self.ends_its_threads()
        self.assertEqual(calls, {"oauth2/token": 1})

    def test_cached_links_open_responses_and_other_tokens_do_not_wait(self):
        soon = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
        soon += datetime.timedelta(seconds=100)  # valid, but due to be refreshed
        self.storage.client._oauth2_access_token_expiration = soon
        (refreshing,) = self.stalled(1)
        begun = time.monotonic()
        other = self.account.storage(oauth2_access_token="valid-token")
        self.assertFalse(other.exists("b"))
        self.assertTrue(DropboxStorage("valid-token").client)
        self.assertEqual(self.storage.url("a"), self.link)
        self.assertEqual(self.file.read(5), LARGE[5:10])
        self.assertTrue(self.storage.exists("a"))
        self.assertLess(time.monotonic() - begun, 0.3)
        self.assertTrue(refreshing.result())
        self.account.release.set()
        self.ends_its_threads()
        self.assertTrue(self.storage.exists("a"))  # a failed early refresh harms nobody


class RecordingAccount(FakeAccount):
    """Keeps the bodies of its responses."""

    def __init__(self):
        super().__init__()
        self.bodies = []

    def send(self, *args, **kwargs):
        response = super().send(*args, **kwargs)
        self.bodies.append(response.raw)
        return response


class BlockTests(StorageTestCase):
    """What a reader requests, and what becomes of its connections."""

    def setUp(self):
        super().setUp()
        self.account.put("/a.txt", b"one\ntw\xc3\xb6\r\nthree")
        self.big = random.Random(3).randbytes(20 * UNIT + 5)

    def test_an_interrupted_read_does_not_skip_either(self):
        class Interrupted(io.BytesIO):
            def read(self, *args):
                if self.tell() > 5 * module.READ_SIZE:
                    raise KeyboardInterrupt
                return super().read(*args)

        data = self.big[: 8 * UNIT]
        self.account.put("/big", data)
        self.account.body = Interrupted
        with self.storage.open("big") as file:
            with self.assertRaises(KeyboardInterrupt):
                file.read()
            self.account.body = io.BytesIO
            with self.assertRaises(DropboxStorageException):
                file.read()
            file.seek(3)
            self.assertTrue(file.read() == data[3:])

    def test_a_reader_who_jumps_requests_one_block_and_one_who_goes_on_more(self):
        self.account.put("/big", self.big)
        with self.storage.open("big") as file:
            with self.costs("files/download"):
                file.seek(10 * UNIT + 1)
                file.read(9)
            for block, requests_until_then in ((6, 4), (7, 7), (8, 7)):
                file.seek(2 * block * UNIT + 1)
                file.read(9)
                self.ends_its_threads()
                # Two blocks after the first, then four, then as many as there are left.
                found = self.account.calls["files/download"]
                self.assertEqual(found, requests_until_then)

    def test_every_response_is_closed_without_the_garbage_collector(self):
        kept, account = [], RecordingAccount()
        account.put("/big", self.big)
        account.put("/small", b"x" * 300)
        storage = account.storage()
        gc.disable()
        self.addCleanup(gc.enable)
        account.fail("files/download", "truncate", times=2)
        for name in ("big", "small"):
            for position, size in ((0, 0), (0, -1), (0, 5 * UNIT), (9, 1)):
                with storage.open(name) as file:
                    file.seek(position)
                    file.read(size)
                kept.append(file)
        with self.assertRaises(ZeroDivisionError):
            storage.save("new", Broken(self.big))
        self.ends_its_threads()
        for body in account.bodies:
            self.assertTrue(body.closed or not body.length_remaining)

    def test_a_response_with_little_left_is_read_to_its_end(self):
        account = RecordingAccount()
        storage = account.storage()
        for size, is_read in ((0, True), (600, True), (700, False)):
            account.put("/a", noise(size))
            with storage.open("a") as file:
                file.read(1)
            self.ends_its_threads()
            self.assertEqual(account.bodies[-1].length_remaining == 0, is_read)
            # A forked process shares the connection with its parent.
            file = storage.open("a")
            file.read(1)
            left = account.bodies[-1].length_remaining
            with unittest.mock.patch.object(os, "getpid", lambda: 1):
                file.close()
            self.ends_its_threads()
            self.assertEqual(account.bodies[-1].length_remaining, left)
            file = storage.open("a")
            file.read(1)
            with unittest.mock.patch.object(_thread, "start_new_thread") as start:
                del file
                gc.collect()
            start.assert_not_called()  # by a finalizer
            self.assertTrue(account.bodies[-1].closed)

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_a_reader_in_a_forked_process_says_so(self):
        self.account.put("/big", self.big)
        file = self.storage.open("big")
        file.read(3 * UNIT)

        def says_so():
            with self.fails("another process"):
                file.read(9 * UNIT)
            return True

        self.assertTrue(holds_in_a_forked_process(says_so))
        self.assertTrue(file.read() == self.big[3 * UNIT :])
        file.close()


class SdkTests(StorageTestCase):
    def test_the_private_parts_of_the_sdk_that_are_used(self):
        """A new SDK that lacks one of them is named here."""
        text = pathlib.Path(module.__file__).read_text(encoding="utf-8")
        private = {f"_{name}" for name in module.CREDENTIALS}
        private |= {"_oauth2_access_token_expiration"}
        private |= {"_headers", "_session", "_timeout"}
        for name in (*private, "check_and_refresh_access_token"):
            self.assertTrue(hasattr(FakeDropbox(), name), name)
        found = set(re.findall(r"\b(?:client|request)\.(_\w+)", text))
        self.assertLessEqual(found, private)

    def test_an_assigned_client_does_not_repeat_calls_by_itself(self):
        self.storage.client, self.storage.max_wait = FakeDropbox(self.account), 0
        for kind in ("503", "429", "expired_token"):
            with self.refused("*", kind, times=99), self.costs("files/get_metadata"):
                self.storage.exists("a")
