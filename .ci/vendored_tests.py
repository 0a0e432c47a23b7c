"""A project's own test beside a copy of the module: no tool may complain of it."""

from django.core.files.base import ContentFile
from django.test import SimpleTestCase
from shop.dropbox_storage import DropboxStorage
from shop.test_dropbox_storage import FakeAccount, FakeDropboxMixin
from typing_extensions import assert_type


class UploadTests(FakeDropboxMixin, SimpleTestCase):
    def test_upload(self) -> None:
        name = DropboxStorage(root_path="/r").save("a", ContentFile(b"x"))
        assert_type(name, str)
        assert_type(self.account, FakeAccount)
        self.assertEqual(self.account.files(), {"/r/a": b"x"})
