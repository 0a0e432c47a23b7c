"""What a type checker must accept of dropbox_storage, and what it must refuse."""

import io
from datetime import datetime
from typing import Any

from django.core.files.base import ContentFile  # type: ignore[import-untyped, unused-ignore]
from typing_extensions import assert_type

from dropbox_storage import (
    DropboxFile,
    DropboxStorage,
    DropboxStorageException,
    authorize,
    check,
)
from test_dropbox_storage import FakeAccount, FakeDropbox, FakeDropboxMixin

storage = DropboxStorage("token", root_path="/media", write_mode="update", timeout=None)
refreshing = DropboxStorage(
    oauth2_refresh_token="token", app_key="key", app_secret="secret"
)


class Media(DropboxStorage):
    root_path = "/media"
    write_mode = "overwrite"


assert_type(storage.open("a"), DropboxFile[bytes])
assert_type(storage.open("a", "wb"), DropboxFile[bytes])
assert_type(storage.open("a", "r"), DropboxFile[str])
assert_type(storage.open("a", "r+b"), DropboxFile[bytes])
assert_type(storage.open("a", "a"), DropboxFile[str])
assert_type(storage.open("a").read(), bytes)
assert_type(storage.open("a", "r").read(5), str)
with storage.open("a", "w") as file:
    assert_type(file, DropboxFile[str])
    file.write("text")
assert_type(Media().open("a").open().size, int)
assert_type(storage.listdir("."), tuple[list[str], list[str]])
assert_type(storage.get_modified_time("a"), datetime)
assert_type(storage.size("a"), int)
assert_type(storage.url(None), str)
assert_type(DropboxStorageException("text").reason, str)
assert_type(DropboxStorageException("text").temporary, bool)
assert_type(DropboxStorageException("text", retry_after=1).retry_after, float)
storage.open("a", "wb").discard()
storage.CHUNK_SIZE = 8 * 1024 * 1024
refreshing.client = storage.client
assert_type(storage.client.files_list_revisions("/a").entries[0].rev, Any)
assert_type(storage.save("a", ContentFile(b"x")), str)
assert_type(storage.save(None, io.BytesIO(b"x")), str)

# A project's test with the fake.
account = FakeAccount(page_size=2, quirks=["gzip"])
account.put("/a", b"x")
account.fail("files/upload", "503", nth=2, times=3, value=1.5)
with account.replace_dropbox() as same, account.counting() as calls:
    assert_type(same, FakeAccount)
    assert_type(calls["files/upload"], int)
assert_type(account.files(), dict[str, bytes])
assert_type(account.follow("https://content.example/"), bytes)
refreshing.client = FakeDropbox(account)


class UploadTests(FakeDropboxMixin):
    def test_upload(self) -> None:
        assert_type(self.account, FakeAccount)


assert_type(storage._full_path("a"), str)
assert_type(storage.open("a", "r").readline(), str)
assert_type(storage.open("a").readline(5), bytes)
assert_type(authorize("app-key"), str)
check("default")


# Each of these lines must be an error; an ignore that is not needed is one, too.
DropboxStorage(token="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
DropboxStorage(write_mode="append")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
DropboxStorage(timeout="9")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
DropboxStorage("a", "b")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
storage.write_mode = "append"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
storage.open("a", "rw")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue,reportArgumentType]
storage.open("a").write("text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
storage.open("a", "w").write(b"x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
account.put("/a", "text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
storage.exists(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
