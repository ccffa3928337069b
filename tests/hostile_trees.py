"""A folder with every kind of file that exists in the wild, for commands that take folders."""

import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.runtime.file_names import printable
from tests.conftest import picture

FILM_BYTES = 3 * 2**30

# Names of photographs that commands must classify like any other.
NAMES = (
    b"plain.png",
    b"caf\xe9.png",
    b"caf\xc3\xa9.png",
    b"n" * 251 + b".png",
    b"line\nbreak.png",
    b"escape\x1b[31m.png",
    "bidi\u202egnp.png".encode(),
    b"-l.png",
    b"=1+1.png",
    b"@home.png",
    b"[red]x[bold].png",
    b"50%.png",
    b"back\\xe9slash.png",
    b"CASE.PNG",
    b"case.png",
)
HOUSEKEEPING = (
    *(
        "@eaDir/plain.png",
        "#recycle",
        "@Recycle",
        ".Trashes",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
    ),
    *(".stversions", ".sync", "__MACOSX", ".@__thumb"),
)


@dataclass(frozen=True)
class HostileTree:
    """The planted folder.

    Args:
        folder: to give to a command.
        good: the photographs.
        bad: files with the suffix of an image, and perhaps a folder, that cannot be classified; each must be reported
            once.
    """

    folder: Path
    good: list[Path]
    bad: list[Path]


def plant(folder: Path) -> HostileTree:
    """Create the folder."""
    folder.mkdir(parents=True)
    good = []
    for number, name in enumerate(NAMES):
        file = Path(os.fsdecode(os.path.join(os.fsencode(folder), name)))  # noqa: PTH118 - bytes
        if not os.path.lexists(file):  # CASE.PNG may be case.png
            file.write_bytes(picture("red", (8 + number, 8)))
            good.append(file)
    (folder / "jpeg named.png").write_bytes(picture("red", (40, 8), "JPEG"))
    good.append(folder / "jpeg named.png")
    for name in HOUSEKEEPING:
        (folder / name).mkdir(parents=True)
        (folder / name / "thumbnail.png").write_bytes(picture("blue"))
    for name in ("._plain.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt"):
        (folder / name).write_bytes(b"\0\5\26\7")
    (folder / "folder.png").mkdir()
    (folder / "up").symlink_to(".")

    bad = {name: folder / f"{name}.png" for name in ("empty", "text", "dangling", "loop", "pipe", "film", "long film")}
    bad["empty"].touch()
    bad["text"].write_text("a shopping list")
    bad["dangling"].symlink_to("nowhere")
    bad["loop"].symlink_to("loop.png")
    os.mkfifo(bad["pipe"])
    bad["film"].write_bytes(b"\0\0\0\x20ftypisom")
    bad["long film"].write_bytes(picture())  # begins like an image
    for name in ("film", "long film"):
        os.truncate(bad[name], FILM_BYTES)
    with socket.socket(socket.AF_UNIX) as listener, suppress(OSError):  # its path may be too long
        listener.bind(os.fspath(folder / "socket.png"))
        bad["socket"] = folder / "socket.png"
    with suppress(OSError):  # only root may
        os.mknod(folder / "device.png", stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
        bad["device"] = folder / "device.png"
    # Neither for root nor for others an image.
    (folder / "locked.png").write_text("no image")
    (folder / "locked.png").chmod(0)
    bad["locked"] = folder / "locked.png"
    closed = folder / "closed"
    closed.mkdir()
    (closed / "inside.png").write_text("no image either")
    closed.chmod(0)
    bad["closed"] = closed / "inside.png" if os.access(closed, os.R_OK) else closed
    return HostileTree(folder, good, list(bad.values()))


def reports_of(tree: HostileTree, stderr: str) -> dict[str, int]:
    """Return how often each bad file is reported."""
    lines = [line for line in stderr.splitlines() if line.startswith("skipped")]
    return {path.name: sum(printable(f"/{path.name}: ") in line for line in lines) for path in tree.bad}


def contents_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the size and the first bytes of each regular file, by its relative path."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place, name)
            if not file.is_symlink() and file.is_file():
                with suppress(PermissionError), file.open("rb") as opened:
                    found[os.path.relpath(file, folder)] = (file.stat().st_size, opened.read(1000))
    return found
