"""Tests of README.md and of the demo."""

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap
import unittest

import django
from django.core.management import call_command
from django.test import SimpleTestCase

from test_dropbox_storage import (  # noqa: F401
    HERE,
    UNIT,
    DropboxStorage,
    FakeAccount,
    demo,
    module,
    setUpModule,
    tearDownModule,
)

README = HERE.with_name("README.md")


# Runs manage.py's commands with every client of the storage on a fake account.
MANAGE = """
import sys, dropbox, test_dropbox_storage as tests
from django.core.management import execute_from_command_line
account, create_session = tests.FakeAccount(), dropbox.create_session
account.refresh_tokens = {"refresh": ("key", None)}
def mounted(*args, **kwargs):
    session = create_session(*args, **kwargs)
    session.mount("https://", account)
    return session
dropbox.create_session = mounted
execute_from_command_line(["manage.py", *sys.argv[1:]])
"""


# The copy of MEDIA_ROOT is interrupted after three files, and made again.
COPY = """
import __main__
import pathlib
lines, text = [], pathlib.Path("copy_media.py").read_text()
def interrupt(line):
    lines.append(line)
    if len(lines) == 3:
        raise KeyboardInterrupt
try:
    exec(text, {"print": interrupt})
except KeyboardInterrupt:
    pass
exec(text, {"print": lines.append})
print(lines)
print(sorted(__main__.account.files()))
"""


# What a visitor does in the project: uploads, looks, and is sent to the login.
VISIT = """
import asyncio
from django.contrib.auth import get_user_model
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client, RequestFactory
from docs import storages, views
from docs.models import Document
user = get_user_model().objects.create_user("user")
request = RequestFactory().get("/")
request.user = user
file = SimpleUploadedFile("a b.txt", b"12345")
document = Document.objects.create(owner=user, file=file)
print(document.file.name, document.file.url)
print(b"".join(views.download(request, document.pk)).decode())
async def read(response):
    return b"".join([part async for part in response])
print(asyncio.run(read(views.stream(document.file.open()))).decode())
client = Client(HTTP_HOST="localhost")
print(client.get(document.file.url)["Location"])
client.force_login(user)
print(client.get(document.file.url)["Location"][:28])
print(storages.Invoices().write_mode)
from docs import files
files.copy("documents/a_b.txt", "copy.txt")
files.move("documents/a_b.txt", "moved.txt")
exists = files.storage.exists
print(exists("copy.txt"), exists("moved.txt"), exists("documents/a_b.txt"))
"""


@unittest.skipUnless(README.exists(), "README.md is not beside the tests")
@unittest.skipIf(django.VERSION < (4, 2), "the README is for Django 4.2 and newer")
class ReadmeTests(unittest.TestCase):
    def blocks(self, language):
        found = re.findall(
            rf"^( *)```{language}\n(.*?)^ *```$",
            README.read_text(encoding="utf-8"),
            re.M | re.S,
        )
        return [textwrap.dedent(block) for _, block in found]

    def manage(self, *arguments):
        environment = {**os.environ, "DROPBOX_OAUTH2_REFRESH_TOKEN": "refresh"}
        environment["DROPBOX_APP_KEY"] = "key"
        environment.update(DJANGO_SETTINGS_MODULE="site_of_a_reader.settings")
        folders = (self.folder, pathlib.Path(module.__file__).parent, README.parent)
        environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
        command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning"]
        done = subprocess.run(
            [*command, "-c", MANAGE, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout + done.stderr

    def test_its_snippets_work_in_the_order_in_which_a_reader_pastes_them(self):
        with tempfile.TemporaryDirectory() as folder:
            self.folder = pathlib.Path(folder)
            project, app = self.folder / "site_of_a_reader", self.folder / "docs"
            call_command("startproject", "site_of_a_reader", folder, verbosity=0)
            app.mkdir()
            call_command("startapp", "docs", str(app), verbosity=0)
            with (project / "settings.py").open("a", encoding="utf-8") as file:
                file.write("INSTALLED_APPS += ['docs']\n")
            blocks = {}
            for block in self.blocks("python"):
                name = re.match(r"# (\w+\.py)\n", block)[1]
                blocks[name] = block
                if name == "copy_media.py":
                    continue  # is pasted into the shell
                home = project if name in ("settings.py", "urls.py") else app
                with (home / name).open("a", encoding="utf-8") as file:
                    file.write(f"\n{block}")
                if name == "models.py":
                    self.manage("makemigrations", "docs")
            written = (app / "migrations" / "0001_initial.py").read_text(
                encoding="utf-8"
            )
            self.assertIn("storage=docs.storages.Invoices()", written)
            self.assertIn("No changes", self.manage("makemigrations", "docs"))
            self.assertIn("OK", self.manage("test", "docs"))
            self.manage("migrate")
            with (project / "settings.py").open("a", encoding="utf-8") as file:
                file.write(f"\nMEDIA_ROOT = {str(self.folder / 'media')!r}\n")
            for number in range(5):
                path = self.folder / "media" / f"dir{number}" / "a b.txt"
                path.parent.mkdir(parents=True)
                path.write_bytes(b"%d" % number)
                path.with_name(".hidden").touch()
            copied = self.folder / "copy_media.py"
            copied.write_text(blocks["copy_media.py"], encoding="utf-8")
            command = re.search(r'shell -c "(.*)"', "".join(self.blocks("sh")))[1]
            shown = self.manage("shell", "-c", f"{COPY}\n{command}\n{VISIT}")
            shown = shown[shown.index("['1 of 5: ") :]
            copied, stored, check, *visit = shown.splitlines()
            order = [f"{n} of 5: dir{n - 1}/a b.txt" for n in (1, 2, 3, 1, 2, 3, 4, 5)]
            self.assertEqual(copied, str(order))
            self.assertEqual(stored, str([f"/media/dir{n}/a b.txt" for n in range(5)]))
            self.assertRegex(
                check, r"^It works: check-\w+\.txt was saved .* in /media,"
            )
            self.assertEqual(
                visit,
                [
                    "documents/a_b.txt /media/documents/a_b.txt",
                    "12345",
                    "12345",
                    "/accounts/login/?next=/media/documents/a_b.txt",
                    "https://content.example/apit",
                    "update",
                    "True True False",
                ],
            )

    def test_its_options_are_those_of_the_module(self):
        rows = re.findall(
            r"^\| `(\w+)` \| `(DROPBOX_\w+)` \| `?([^`|]*?)`? ?\|",
            README.read_text(encoding="utf-8"),
            re.M,
        )
        for name, setting, default in rows:
            option = module.OPTIONS[name]
            self.assertEqual(option.setting, setting)
            self.assertEqual(eval(default.strip() or "None"), option.default)
        self.assertEqual({name for name, *_ in rows}, module.OPTIONS.keys())
        for name, value, unit in re.findall(
            r"`([A-Z_]+)`\s\(([\d.]+)\s(MiB)?", README.read_text(encoding="utf-8")
        ):
            value = float(value) * (UNIT if unit else 1)
            self.assertEqual(getattr(DropboxStorage, name), value)


class DemoTests(SimpleTestCase):
    def test_it_shows_every_step_and_counts_what_differs(self):
        class Forgetful(FakeAccount):
            def page(self, found, *args, **kwargs):
                return super().page([], *args, **kwargs)

        for account, failures in ((FakeAccount(), 0), (Forgetful(), 1)):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                self.assertEqual(demo([str(HERE)], account), failures)
            output = output.getvalue()
            self.assertIn("  save       test_", output)
            self.assertIn("1 x files/get_metadata, 1 x files/upload", output)
            self.assertIn("DIFFER" if failures else "Everything as expected.", output)
