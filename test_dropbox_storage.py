"""Tests of dropbox_storage, and a fake Dropbox on which they and a demo run."""

import unittest

from django.conf import settings

if not settings.configured:
    settings.configure(USE_TZ=True)

from django.core.exceptions import ImproperlyConfigured  # noqa: E402

from dropbox_storage import DropboxStorage  # noqa: E402


class OptionsTests(unittest.TestCase):
    def test_an_unknown_option_is_named(self):
        with self.assertRaisesRegex(ImproperlyConfigured, "Unknown option token;"):
            DropboxStorage(token="x")


if __name__ == "__main__":
    unittest.main()
