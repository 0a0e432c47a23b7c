"""Which faults survive this storage, django-storages, and sixty lines on the SDK?

    pip install django-storages
    python .ci/compare.py

Each fault meets one operation, on a fake account behind the real SDK. It is survived if
the operation does what it does without the fault, or raises what Django expects, within
twenty seconds.
"""

import concurrent.futures
import io
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from django.conf import settings

settings.configure()

import dropbox
from django.core.files.base import ContentFile, File
from django.core.files.storage import Storage
from storages.backends.dropbox import DropboxStorage as Other

from dropbox_storage import DropboxStorage
from test_dropbox_storage import FakeAccount, FakeDropbox, MiB, noise

HUGE = noise(20 * MiB)


class Simple(Storage):
    """As people write it themselves."""

    def __init__(self):
        self.client = None

    def _open(self, name, mode="rb"):
        return File(io.BytesIO(self.client.files_download(f"/{name}")[1].content), name)

    def _save(self, name, content):
        self.client.files_upload(content.read(), f"/{name}")
        return name

    def exists(self, name):
        try:
            return bool(self.client.files_get_metadata(f"/{name}"))
        except dropbox.exceptions.ApiError:
            return False

    def listdir(self, path):
        entries = self.client.files_list_folder(f"/{path}".rstrip("/")).entries
        folder = dropbox.files.FolderMetadata
        folders = [entry.name for entry in entries if isinstance(entry, folder)]
        return folders, [entry.name for entry in entries if entry.name not in folders]

    def delete(self, name):
        self.client.files_delete_v2(f"/{name}")

    def url(self, name):
        return self.client.files_get_temporary_link(f"/{name}").link


class Racing:
    """Content whose name is taken while it is read."""

    size = 3

    def __init__(self, account):
        self.account = account
        self.file = io.BytesIO(b"new")

    def read(self, *args):
        self.account.put("/new", b"theirs")
        return self.file.read(*args)

    def chunks(self, *args):
        yield self.read()

    def seek(self, *args):
        return self.file.seek(*args)


def save(storage, account):
    name = storage.save("new", ContentFile(b"new"))
    return account.files() == {"/a": b"old", "/huge": HUGE, f"/{name}": b"new"}


def save_large(storage, account):
    name = storage.save("new", ContentFile(HUGE))
    return account.files() == {"/a": b"old", "/huge": HUGE, f"/{name}": HUGE}


def save_racing(storage, account):
    name = storage.save("new", Racing(account))
    files = account.files()
    return files["/new"] == b"theirs" and files[f"/{name}"] == b"new"


def read(storage, account):
    try:
        with storage.open("huge") as file:
            return file.read() == HUGE
    except Exception as error:
        return "other bytes" in str(error)  # a wrong byte is reported


def exists(storage, account):
    try:
        return storage.exists("a")
    except Exception:
        return True  # False would let the file be overwritten


def listing(storage, account):
    account.page_size = 1
    return sorted(storage.listdir("")[1]) == ["a", "huge"]


def write(storage, account):
    with storage.open("a", "wb") as file:
        file.write(b"new")
    return account.files()["/a"] == b"new"


FAULTS = (
    ("a connection is cut before a save", save, "files/upload", "reset"),
    ("a connection is cut after a save", save, "files/upload", "reset_after"),
    ("Dropbox is down for a moment (503)", save, "files/upload", "503"),
    ("the account is busy (too_many_write_operations)", save, "files/upload", "/path/too_many_write_operations"),
    ("a rate limit without an end (429)", save, "files/upload", "429_for_ever"),
    ("a proxy answers with a page (502)", exists, "files/get_metadata", "html"),
    ("a connection is cut in a large save", save_large, "*", "reset"),
    ("a download is cut", read, "files/download", "truncate"),
    ("a byte of a download is wrong", read, "files/download", "corrupt"),
    ("the token is refused while exists() asks", exists, "files/get_metadata", "invalid_token"),
    ("a folder has more than one page", listing, None, None),
    ("the name is taken during a save", save_racing, None, None),
    ("a file is written through open('wb')", write, None, None),
)  # fmt: skip


def survives(make, operation, route, kind):
    account = FakeAccount()
    account.put("/a", b"old")
    account.put("/huge", HUGE)
    storage = make()
    storage.client = FakeDropbox(account)
    if kind == "429_for_ever":
        account.fail(route, "429", times=10**9, value=1)
        storage.max_wait = 3  # seconds: ours says so then
    elif kind:
        account.fail(route, kind)
    try:
        return bool(operation(storage, account))
    except Exception as error:
        return kind == "429_for_ever" and getattr(error, "temporary", False)


def main():
    makers = {
        "dropbox_storage": lambda: DropboxStorage("valid-token"),
        "django-storages": lambda: Other("valid-token"),
        "sixty lines": Simple,
    }
    print(f"{'':50}" + "".join(f"{name:>18}" for name in makers))
    counts = dict.fromkeys(makers, 0)
    for said, operation, route, kind in FAULTS:
        row = f"{said:50}"
        for name, make in makers.items():
            pool = concurrent.futures.ThreadPoolExecutor(1)
            future = pool.submit(survives, make, operation, route, kind)
            try:
                found = future.result(timeout=20)
            except concurrent.futures.TimeoutError:
                found = False
            counts[name] += found
            row += f"{'survives' if found else 'fails':>18}"
        print(row, flush=True)
    print(f"{f'of {len(FAULTS)}':50}" + "".join(f"{n:>18}" for n in counts.values()))
    sys.stdout.flush()
    os._exit(0)  # some wait for ever


if __name__ == "__main__":
    main()
