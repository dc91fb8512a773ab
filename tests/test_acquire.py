"Hostile archives, a Kaggle of our own on 127.0.0.1 behind the real client, and folders as the public sets lay them out"
import base64
import hashlib
import io
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

import phoenix.data.acquire as module
from phoenix.data.acquire import AcquireError, ArchiveLimits, Manifest, acquire, build_manifest, check_archive, find_credentials
from phoenix.data.audit import audit


def png(level=90, size=8):
    b = io.BytesIO()
    Image.fromarray(np.full((size, size), level, "uint8")).save(b, "PNG")
    return b.getvalue()


def tree(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


GOOD = {"Training/glioma/a.png": png(10), "Training/no_tumor/b.png": png(20), "Testing/glioma/c.png": png(30)}


def folder(root, files=GOOD):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def zipped(path, members, packing=zipfile.ZIP_DEFLATED):
    "A zip with the good files and then `members`: (name, data, unix mode, flag bits)"
    with zipfile.ZipFile(path, "w", packing) as z:
        for name, data, mode, *_ in [(n, d, 0) for n, d in GOOD.items()] + members:
            i = zipfile.ZipInfo("x")
            i.filename = i.orig_filename = name
            i.compress_type, i.create_system, i.external_attr = packing, 3, mode << 16
            z.writestr(i, data)
    return path


def tarred(path, members, mode="w:gz", format=tarfile.PAX_FORMAT):
    "A tar with the good files and then `members`: (name, type, data, pax headers)"
    with tarfile.open(path, mode, format=format) as t:
        for name, kind, data, pax in [(n, tarfile.REGTYPE, d, {}) for n, d in GOOD.items()] + members:
            i = tarfile.TarInfo(name)
            i.type, i.size, i.linkname, i.pax_headers = kind, len(data), "../../etc/passwd", pax
            t.addfile(i, io.BytesIO(data))
    return path


NAMES = ["../evil.png", "Training/../../evil.png", "ABSOLUTE/evil.png", "//evil.png", "C:\\evil.png", "C:/evil.png",
         "Training\\..\\..\\evil.png", "..", "a/" * 40 + "evil.png", "x" * 300 + ".png", "a\nb.png", "\x1b[2J.png"]


@pytest.fixture
def refused(tmp_path):
    "Assert that an archive is refused whole: one AcquireError, nothing new on the disk"
    def check(path, contains="", **k):
        before = tree(tmp_path)
        with pytest.raises(AcquireError) as e: acquire(path, tmp_path / "out", progress=False, **k)
        assert tree(tmp_path) == before
        assert contains in str(e.value) and "\n" not in str(e.value)
        with pytest.raises(AcquireError): check_archive(path, **k)
    return check


@pytest.mark.parametrize("name", NAMES, ids=lambda n: repr(n[:24]))
def test_zip_paths(name, tmp_path, refused):
    name = name.replace("ABSOLUTE", str(tmp_path))
    refused(zipped(tmp_path / "e.zip", [(name, png(), 0)]), "plain relative paths")


@pytest.mark.parametrize("name", NAMES, ids=lambda n: repr(n[:24]))
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_tar_paths(name, mode, tmp_path, refused):
    name = name.replace("ABSOLUTE", str(tmp_path))
    refused(tarred(tmp_path / "e.tar", [(name, tarfile.REGTYPE, png(), {})], mode), "plain relative paths")


def test_zip_name_with_nul(tmp_path, refused):
    path = zipped(tmp_path / "e.zip", [("evilXpng", png(), 0)])
    path.write_bytes(path.read_bytes().replace(b"evilXpng", b"evil\0png"))
    refused(path, "plain relative paths")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_zip_links_and_devices(mode, tmp_path, refused):
    refused(zipped(tmp_path / "e.zip", [("Training/glioma/l.png", b"/etc/passwd", mode | 0o777)]), "a link or a device")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_tar_links_and_devices(kind, mode, tmp_path, refused):
    refused(tarred(tmp_path / "e.tar", [("Training/glioma/l.png", kind, b"", {})], mode), "a link, a device or sparse")


def test_tar_sparse(tmp_path, refused):
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2 ** 40), "GNU.sparse.name": "s.png"}
    refused(tarred(tmp_path / "e.tar", [("s.png", tarfile.REGTYPE, b"1\n0\n512\n".ljust(1024, b"\0"), pax)]), "sparse")


def test_zip_encrypted(tmp_path, refused):
    path = zipped(tmp_path / "e.zip", [])
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1
    path.write_bytes(data)
    refused(path, "encrypted")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_twice_or_file_and_folder(tmp_path, refused):
    refused(zipped(tmp_path / "a.zip", [("Training/glioma/a.png", png(), 0)]), "there twice")
    refused(zipped(tmp_path / "b.zip", [("Training/glioma", b"x", 0)]), "a file and a folder at once")
    refused(tarred(tmp_path / "c.tar", [("Training/glioma/a.png/b.png", tarfile.REGTYPE, png(), {})]), "a file and a folder")


@pytest.mark.parametrize("make", [lambda p: zipped(p, [("Training/glioma/z.png", bytes(40 * 2 ** 20), 0)]),
                                  lambda p: tarred(p, [("z.png", tarfile.REGTYPE, bytes(40 * 2 ** 20), {})]),
                                  lambda p: tarred(p, [("z.png", tarfile.REGTYPE, bytes(40 * 2 ** 20), {})], "w:xz")])
def test_bombs(make, tmp_path, refused):
    refused(make(tmp_path / "bomb"), "bomb")


def test_a_bomb_of_headers(tmp_path, refused):
    pax = {"comment": "a" * 3_000_000}
    refused(tarred(tmp_path / "e.tar", [("a.png", tarfile.REGTYPE, png(), pax)]), "headers")


def test_limits(tmp_path, refused):
    refused(zipped(tmp_path / "a.zip", []), "may hold 2 files", limits=ArchiveLimits(files=2))
    refused(tarred(tmp_path / "b.tar", []), "may hold 2 files", limits=ArchiveLimits(files=2))
    refused(zipped(tmp_path / "c.zip", []), "goes beyond", limits=ArchiveLimits(bytes=100))
    refused(tarred(tmp_path / "d.tar", []), "goes beyond", limits=ArchiveLimits(bytes=100))


def unpack_refused(path, tmp_path):
    "Whether acquire refuses and leaves nothing: for damage that only shows while unpacking"
    before = tree(tmp_path)
    try: acquire(path, tmp_path / "out", progress=False)
    except AcquireError:
        assert tree(tmp_path) == before
        return True
    shutil.rmtree(tmp_path / "out")
    return False


def test_a_zip_that_lies_about_its_sizes(tmp_path):
    path = zipped(tmp_path / "e.zip", [("Training/glioma/z.png", png() * 50, 0)])
    data, n = path.read_bytes(), len(png() * 50)
    for size in (10, n - 1, n + 1, 2 ** 31):
        path.write_bytes(data.replace(struct.pack("<I", n), struct.pack("<I", size)))
        assert unpack_refused(path, tmp_path)


def test_a_zip_with_changed_bytes(tmp_path):
    path = zipped(tmp_path / "e.zip", [], zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.index(png(30)) + 30] ^= 4
    path.write_bytes(data)
    assert unpack_refused(path, tmp_path)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_tar_cut_short_anywhere(mode, tmp_path):
    path = tarred(tmp_path / "e.tar", [], mode)
    data = path.read_bytes()
    last = 512 * (2 * len(GOOD)) if mode == "w" else len(data) - 1
    for n in sorted({*range(512, last, 512 if mode == "w" else 97), last}):
        path.write_bytes(data[:n])
        assert unpack_refused(path, tmp_path), f"{n} of {len(data)} bytes were accepted"


def test_a_tar_with_a_damaged_header_in_the_middle(tmp_path):
    path = tarred(tmp_path / "e.tar", [], "w")
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    assert unpack_refused(path, tmp_path)


def test_no_archive_at_all(tmp_path, refused):
    for name, data in {"a.zip": b"<html>", "b.tar.gz": b"\x1f\x8bnonsense", "c.zip": b"PK\x03\x04nonsense", "d.tar": b""}.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name)


def test_full_disk(tmp_path, monkeypatch):
    path = zipped(tmp_path / "g.zip", [])
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 10, 10))
    assert unpack_refused(path, tmp_path)
    monkeypatch.undo()

    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert unpack_refused(path, tmp_path)


@pytest.mark.parametrize("pack", [lambda p: zipped(p, []), lambda p: zipped(p, [], zipfile.ZIP_STORED), lambda p: tarred(p, [], "w"),
                                  lambda p: tarred(p, []), lambda p: tarred(p, [], "w:xz"),
                                  lambda p: tarred(p, [], format=tarfile.GNU_FORMAT)])
def test_good_archives_give_the_folders_manifest(pack, tmp_path):
    want = build_manifest(folder(tmp_path / "set"), progress=False)
    got = acquire(pack(tmp_path / "any.name"), tmp_path / "out", progress=False)
    assert got.sha256 == want.sha256 and got.root == tmp_path / "out"
    assert acquire(tmp_path / "any.name", tmp_path / "out", progress=False).sha256 == want.sha256
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_changed_raw_folder_is_not_reused(tmp_path):
    path = zipped(tmp_path / "g.zip", [])
    acquire(path, tmp_path / "out", progress=False)
    (tmp_path / "out/Training/glioma/a.png").write_bytes(png(99))
    with pytest.raises(AcquireError, match="changed since"): acquire(path, tmp_path / "out", progress=False)


def test_an_occupied_folder_is_never_written_over(tmp_path):
    folder(tmp_path / "out", {"thesis.tex": b"years of work"})
    for source in ("phantom", zipped(tmp_path / "g.zip", [])):
        with pytest.raises(AcquireError, match="name another"): acquire(source, tmp_path / "out", progress=False)
    assert tree(tmp_path / "out") == ["thesis.tex"]


# ---- thirty and more malicious archives, each by name

FILE, PNG = tarfile.REGTYPE, png()


def zip_patched(change):
    "A good zip after `change(bytearray, offset of the first central entry)`"
    def make(path):
        data = bytearray(zipped(path, []).read_bytes())
        change(data, data.index(b"PK\x01\x02"))
        path.write_bytes(data)
    return make


def zip_member(name, mode=0, data=PNG): return lambda path: zipped(path, [(name, data, mode)])


def tar_member(name, kind=FILE, data=PNG, pax=(), **k): return lambda path: tarred(path, [(name, kind, data, dict(pax))], **k)


def zip_with_nul(path):
    path.write_bytes(zipped(path, [("evilXpng", PNG, 0)]).read_bytes().replace(b"evilXpng", b"evil\0png"))


def zip_overlapping(path):
    "A member whose body is another member, header and all: the best known bombs quote each other like this"
    with zipfile.ZipFile(path, "w") as z: z.writestr("b.png", PNG)
    inner = path.read_bytes()
    at, end = inner.index(b"PK\x01\x02"), inner.index(b"PK\x05\x06")
    data = zipped(path, [("a.png", inner[:at], 0)], zipfile.ZIP_STORED).read_bytes()
    entry, close = bytearray(inner[at:end]), data.index(b"PK\x05\x06")
    struct.pack_into("<I", entry, 42, data.index(inner[:at]))
    out = bytearray(data[:close] + entry + data[close:])
    directory = data.index(b"PK\x01\x02")
    struct.pack_into("<HHI", out, close + len(entry) + 8, len(GOOD) + 2, len(GOOD) + 2, close - directory + len(entry))
    path.write_bytes(out)


def zip64_lie(path):
    "A central entry that sends the reader to a zip64 field which is not there"
    zip_patched(lambda d, at: struct.pack_into("<I", d, at + 24, 0xFFFFFFFF))(path)


def zip64_size(path):
    "A zip64 field that announces an exbibyte"
    data = bytearray(zipped(path, []).read_bytes())
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    n = struct.unpack_from("<H", data, at + 28)[0]
    struct.pack_into("<I", data, at + 24, 0xFFFFFFFF)
    struct.pack_into("<H", data, at + 30, 12)
    struct.pack_into("<I", data, end + 12, struct.unpack_from("<I", data, end + 12)[0] + 12)
    data[at + 46 + n:at + 46 + n] = struct.pack("<HHQ", 1, 8, 2 ** 60)
    path.write_bytes(data)


def tar_raw(change):
    "A good tar, not packed, after `change` of its first header, with the checksum made right again"
    def make(path):
        data = bytearray(tarred(path, [], "w").read_bytes())
        change(data)
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        path.write_bytes(data)
    return make


def tar_global(path):
    "A global header that renames whatever follows"
    tarred(path, [], "w")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "../../evil.png"}) as t:
        i = tarfile.TarInfo("a.png")
        i.size = len(PNG)
        t.addfile(i, io.BytesIO(PNG))


def tar_longname(path):
    "A GNU long name that climbs out, before a harmless short one"
    name = ("../" * 60 + "evil.png").encode() + b"\0"
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, len(name)
    blocks = [long.tobuf(tarfile.GNU_FORMAT), name.ljust(-(-len(name) // 512) * 512, b"\0")]
    tarred(path, [], "w", tarfile.GNU_FORMAT)
    path.write_bytes(b"".join(blocks) + path.read_bytes())


def tar_gnu_sparse(path):
    i = tarfile.TarInfo("s.png")
    i.type, i.size = tarfile.GNUTYPE_SPARSE, 512
    tarred(path, [], "w", tarfile.GNU_FORMAT)
    path.write_bytes(i.tobuf(tarfile.GNU_FORMAT) + bytes(512) + path.read_bytes())


EVIL = {
    "zip: climbs out": zip_member("../evil.png"), "zip: climbs out from within": zip_member("Training/../../evil.png"),
    "zip: absolute path": zip_member("/tmp/evil.png"), "zip: double slash": zip_member("//host/evil.png"),
    "zip: drive": zip_member("C:\\evil.png"), "zip: drive-relative": zip_member("C:evil.png"),
    "zip: network share": zip_member("\\\\host\\share\\evil.png"), "zip: backslashes": zip_member("a\\..\\..\\evil.png"),
    "zip: NUL in a name": zip_with_nul, "zip: control characters": zip_member("\x1b[2Ja.png"),
    "zip: long name": zip_member("x" * 300 + ".png"), "zip: deep path": zip_member("a/" * 40 + "a.png"),
    "zip: two dots in one character": zip_member("‥/evil.png"), "zip: wide slash": zip_member("a／..／evil.png"),
    "zip: reversed text": zip_member("Training/glioma/\u202egnp.exe"), "zip: alternate stream": zip_member("a.png:evil"),
    "zip: reserved name": zip_member("Training/glioma/NUL.png"), "zip: trailing dot": zip_member("Training/glioma./a.png"),
    "zip: symbolic link": zip_member("l.png", stat.S_IFLNK | 0o777, b"/etc/passwd"), "zip: device": zip_member("d.png", stat.S_IFBLK),
    "zip: pipe": zip_member("p.png", stat.S_IFIFO), "zip: twice": zip_member("Training/glioma/a.png"),
    "zip: twice but for case": zip_member("training/GLIOMA/A.png"), "zip: file and folder": zip_member("Training/glioma"),
    "zip: encrypted": zip_patched(lambda d, at: d.__setitem__(at + 8, d[at + 8] | 1)),
    "zip: unknown packing": zip_patched(lambda d, at: struct.pack_into("<H", d, at + 10, 97)),
    "zip: bomb": zip_member("z.png", data=bytes(20 * 2 ** 20)), "zip: announces 2 GiB": zip_patched(lambda d, at: struct.pack_into("<I", d, at + 24, 2 ** 31)),
    "zip: announces less": zip_patched(lambda d, at: struct.pack_into("<I", d, at + 24, 9)),
    "zip: wrong checksum": zip_patched(lambda d, at: struct.pack_into("<I", d, at + 16, 1)),
    "zip: two names for one body": zip_patched(lambda d, at: d.__setitem__(slice(at + 46, at + 47), b"X")),
    "zip: body elsewhere": zip_patched(lambda d, at: struct.pack_into("<I", d, at + 42, 7)),
    "zip: overlapping bodies": zip_overlapping, "zip: zip64 field absent": zip64_lie, "zip: zip64 exbibyte": zip64_size,
    "zip: directory elsewhere": zip_patched(lambda d, at: struct.pack_into("<I", d, len(d) - 6, 3)),
    "tar: climbs out": tar_member("../evil.png"), "tar: absolute path": tar_member("/tmp/evil.png"),
    "tar: symbolic link": tar_member("l.png", tarfile.SYMTYPE, b""), "tar: hard link": tar_member("l.png", tarfile.LNKTYPE, b""),
    "tar: device": tar_member("d.png", tarfile.CHRTYPE, b""), "tar: pipe": tar_member("p.png", tarfile.FIFOTYPE, b""),
    "tar: pax path": tar_member("a.png", pax={"path": "../../evil.png"}), "tar: global pax path": tar_global,
    "tar: GNU long name": tar_longname, "tar: bytes that are no text": tar_member("a\udcff.png", format=tarfile.GNU_FORMAT),
    "tar: pax sparse": tar_member("s.png", data=b"1\n0\n512\n".ljust(1024, b"\0"), pax={
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2 ** 40), "GNU.sparse.name": "s.png"}),
    "tar: GNU sparse": tar_gnu_sparse, "tar: part of a volume": tar_member("v.png", b"M"), "tar: list of names": tar_member("d.png", b"D"),
    "tar: pax size": tar_member("a.png", pax={"size": str(2 ** 50)}), "tar: negative size": tar_raw(lambda d: d.__setitem__(slice(124, 136), b"\xff" * 12)),
    "tar: huge size": tar_raw(lambda d: d.__setitem__(slice(124, 136), b"\x80" + b"\x7f" * 11)),
    "tar: twice but for an accent": lambda path: tarred(path, [("é.png", FILE, PNG, {}), ("e\u0301.png", FILE, PNG, {})]),
    "tar: bomb": tar_member("z.png", data=bytes(20 * 2 ** 20)), "tar: bomb of headers": tar_member("a.png", pax={"comment": "a" * 3_000_000})}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_malicious_archives(tmp_path):
    "Every one refused by one sentence, nothing written, nothing left over"
    refusals = {}
    for n, (name, make) in enumerate(EVIL.items()):
        make(path := tmp_path / f"{n}.archive")
        before = tree(tmp_path)
        with pytest.raises(AcquireError) as e: acquire(path, tmp_path / "out", progress=False)
        assert tree(tmp_path) == before and "\n" not in str(e.value), name
        refusals[name] = str(e.value)
        path.unlink()
    print(f"{len(refusals)} malicious archives, {len(refusals)} refused, nothing written")
    assert len(refusals) == len(EVIL) >= 30


def test_an_archive_in_an_archive_is_not_opened(tmp_path):
    zipped(tmp_path / "inner.zip", [("z.png", bytes(20 * 2 ** 20), 0)])
    zipped(tmp_path / "outer.zip", [("Training/glioma/inner.zip", (tmp_path / "inner.zip").read_bytes(), 0)])
    m = acquire(tmp_path / "outer.zip", tmp_path / "out", progress=False)
    assert m.leftovers == [("Training/glioma/inner.zip", "not a picture")] and len(m.table) == len(GOOD)


# ---- folders


def test_a_folder_is_used_in_place_and_only_read(tmp_path):
    root = folder(tmp_path / "set")
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in [root, *root.rglob("*")]}
    m = acquire(root, tmp_path / "out", progress=False)
    assert m.root == root and not (tmp_path / "out").exists()
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in [root, *root.rglob("*")]}


def test_every_file_is_decoded_once(tmp_path, monkeypatch):
    calls, real = [], module.read_pixels
    monkeypatch.setattr(module, "read_pixels", lambda data, **k: calls.append(hashlib.sha256(data).hexdigest()) or real(data, **k))
    m = build_manifest(folder(tmp_path / "set"), progress=False)
    assert sorted(calls) == sorted(m.table.sha256) and len(calls) == len(GOOD)


def test_workers_change_nothing(tmp_path):
    root = folder(tmp_path / "set", {f"glioma/{k}.png": png(k) for k in range(60)})
    tables = [build_manifest(root, progress=False, workers=w).table for w in (1, 2, 8)]
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])


LAYOUTS = {
    "sartaj": ({"Training/glioma_tumor/gg (1).jpg": "glioma Training", "Testing/no_tumor/image(1).jpg": "no_tumor Testing"}, 0),
    "nickparvar": ({"Training/notumor/Tr-no_0010.jpg": "no_tumor Training", "Testing/pituitary/Te-pi_0010.jpg": "pituitary Testing"}, 0),
    "navoneel": ({"yes/Y1.jpg": "tumor ", "no/1 no.jpeg": "no_tumor ", "brain_tumor_dataset/yes/Y1.jpg": "tumor "}, 0),
    "br35h": ({"yes/y0.jpg": "tumor ", "no/no0.jpg": "no_tumor ", "pred/pred0.jpg": None, "Br35H-Mask-RCNN/TRAIN/y1.jpg": None,
               "Br35H-Mask-RCNN/TRAIN/a.json": None}, 3),
    "three": ({"train/Glioma/1.png": "glioma Training", "val/Glioma/2.png": "glioma validation", "test/Healthy/3.png": "no_tumor Testing"}, 0),
    "wrapped": ({"archive/Data/Train/Meningioma/1.png": "meningioma Training", "archive/Data/Test/normal/2.png": "no_tumor Testing"}, 0),
    "patients": ({"Training/glioma/patient 3/1.png": "glioma Training", "Training/no/p4/deep/2.png": "no_tumor Training"}, 0),
    "heads": ({"glioma/patient 3/1.png": "glioma ", "no/p4/deep/2.png": "no_tumor "}, 0),
    "litter": ({"glioma/1.png": "glioma ", "no/2.png": "no_tumor ", "glioma/.DS_Store": None, "glioma/._1.png": None,
                "__MACOSX/glioma/1.png": None, "glioma/Thumbs.db": None, "README.txt": None}, 5)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, tmp_path):
    layout, leftovers = LAYOUTS[name]
    m = build_manifest(folder(tmp_path / "x", {f: png(k + 1) for k, f in enumerate(layout) if f.endswith(("g",))} | {
        f: b"text" for f in layout if not f.endswith("g")}), progress=False)
    got = {(m.root / r.path).relative_to(tmp_path / "x").as_posix(): f"{r.label} {r.split}" for r in m.table.itertuples()}
    assert got == {f: v for f, v in layout.items() if v is not None}
    assert len(m.leftovers) == leftovers and (m.table.problem == "").all()


def test_links(tmp_path):
    root = folder(tmp_path / "set")
    (root / "Training/glioma/loop").symlink_to(root)
    (root / "Training/glioma/link.png").symlink_to(root / "Training/glioma/a.png")
    (root / "Training/glioma/gone.png").symlink_to(root / "nowhere.png")
    m = build_manifest(root, progress=False)
    assert ("Training/glioma/loop", "link to a folder, not followed") in m.leftovers
    problems = m.table.set_index("path").problem
    assert problems["Training/glioma/link.png"] == "" and problems["Training/glioma/gone.png"].startswith("missing:")


@pytest.mark.parametrize("text,why", [
    ("file,label\n/etc/passwd,glioma\n", "below the folder"), ("file,label\n../x.png,glioma\n", "below the folder"),
    ("file,label\na.png,\n", "must have a label"), ("file,label,fold\na.png,glioma,two\n", "whole number"),
    ("file,label\na.png,glioma\na.png,glioma\n", "each file once"), ("image,mask\na,b\n", "columns file and label"),
    ("", "must be a table"), ("file,label\n", "no labelled picture")])
def test_bad_manifest_csv(text, why, tmp_path):
    root = folder(tmp_path / "set", {"a.png": png(), "manifest.csv": text.encode()})
    with pytest.raises(AcquireError, match=why): build_manifest(root, progress=False)


def test_manifest_csv(tmp_path):
    text = "\ufefffile,label,patient,fold,source,series\n./a.png,Glioma_tumor,NA,1,cheng,s1\nb.png,notumor,,,,\nc.png,yes,007,3,x,s\n"
    root = folder(tmp_path / "set", {"a.png": png(1), "b.png": png(2), "d.png": png(4), "manifest.csv": text.encode()})
    m = build_manifest(root, progress=False)
    rows = [(r.path, r.label, r.patient, r.source, r.series, r.problem.split(":")[0]) for r in m.table.itertuples()]
    assert rows == [("a.png", "glioma", "NA", "cheng", "s1", ""), ("b.png", "no_tumor", "", "", "", ""),
                    ("c.png", "tumor", "007", "x", "s", "missing")]
    assert m.table.fold.astype(object).where(m.table.fold.notna(), None).tolist() == [1, None, 3]
    assert m.leftovers == [("d.png", "not named in manifest.csv")] and m.has_patients
    again = Manifest.load(m.save(tmp_path / "m.json"))
    assert again.table.equals(m.table) and again.leftovers == m.leftovers and again.root == root


def test_the_hash_of_a_manifest_sees_content_only(tmp_path):
    m = build_manifest(folder(tmp_path / "a"), progress=False)
    assert m.sha256 == build_manifest(folder(tmp_path / "deep/b"), progress=False).sha256
    for column, value in dict(label="pituitary", patient="p", split="validation", fold=4, sha256="0", pixels_sha256="0", path="z",
                              source="s", problem="corrupt: x").items():
        other = Manifest(m.root, m.table.copy(), m.source)
        other.table.loc[0, column] = value
        assert other.sha256 != m.sha256, column


@pytest.mark.parametrize("damage", [lambda s: s.replace("glioma", "pituitary", 1), lambda s: s[:-20], lambda s: "[]", lambda s: "{}"])
def test_an_edited_manifest_is_refused(damage, tmp_path):
    path = build_manifest(folder(tmp_path / "a"), progress=False).save(tmp_path / "m.json")
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match="must"): Manifest.load(path)


# ---- Kaggle

HANDLE = "owner/brain-set"
CANARY = "0123456789abcdef-secret"


class Kaggle(ThreadingHTTPServer):
    "The two calls and the storage that kagglehub uses, with faults on demand"
    daemon_threads = True

    def __init__(self, archive):
        super().__init__(("127.0.0.1", 0), Handler)
        self.archive, self.view, self.download, self.seen, self.ranges = archive, 200, 200, [], []
        self.cut, self.md5, self.private, self.headers, self.code_in_body, self.faults = 0, True, False, {}, 0, []

    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *a): pass

    def answer(self, status, body=b"{}", kind="application/json", **headers):
        self.send_response(status)
        for k, v in {"Content-Type": kind, "Content-Length": str(len(body)), **self.server.headers, **headers}.items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        s, who = self.server, self.headers.get("Authorization", "")
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        s.seen.append((self.path.rsplit("/", 1)[1], who, request))
        if s.private and not who: return self.answer(s.private, b'{"code":%d,"message":"Unauthenticated"}' % s.private)
        view = self.path == "/api/v1/datasets.DatasetApiService/GetDataset"
        if s.code_in_body: return self.answer(200, b'{"code":%d,"message":"no"}' % s.code_in_body)
        status = s.view if view else s.download
        if status >= 400: return self.answer(status, b"<html>an error page</html>", "text/html")
        if view: return self.answer(200, json.dumps(dict(currentVersionNumber=3, ownerName="o")).encode())
        return self.answer(302, b"", Location=f"{s.url}/storage/archive.zip")

    def do_GET(self):
        s, full = self.server, self.server.archive
        md5 = {"x_goog_hash": "md5=" + base64.b64encode(hashlib.md5(WHOLE_ARCHIVE).digest()).decode()} if s.md5 else {}
        asked = self.headers.get("Range")
        s.ranges.append(asked)
        start = int(asked[6:-1]) if asked else 0
        if s.faults and (fault := s.faults.pop(0)): return fault(self, start, full, md5)
        body = full[start:]
        self.send_response(206 if asked else 200)
        for k, v in {"Content-Type": "application/zip", "Content-Length": str(len(body)), "Accept-Ranges": "bytes", **md5}.items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        self.wfile.write(body[:s.cut] if s.cut else body)


def archive_bytes(seed=1):
    b = io.BytesIO()
    with zipfile.ZipFile(b, "w", zipfile.ZIP_STORED) as z:
        for n, d in GOOD.items(): z.writestr(zipfile.ZipInfo(n), d if seed == 1 else png(seed))
        z.writestr(zipfile.ZipInfo("notes.txt"), np.random.Generator(np.random.Philox(seed)).bytes(3_000_000))
    return b.getvalue()


WHOLE_ARCHIVE, OTHER_ARCHIVE = archive_bytes(), archive_bytes(2)


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    import kagglehub.config
    from kagglesdk import kaggle_env
    for name in list(os.environ):
        if name.startswith(("KAGGLE", "TBE_", "DISABLE_")): monkeypatch.delenv(name)
    home = tmp_path / "home"
    (home / ".kaggle").mkdir(parents=True)
    server = Kaggle(WHOLE_ARCHIVE)
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    for name, value in dict(HOME=home, KAGGLEHUB_CACHE=tmp_path / "cache", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1",
                            KAGGLE_API_ENVIRONMENT="LOCALHOST").items(): monkeypatch.setenv(name, str(value))
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, server.url)
    monkeypatch.setattr(kagglehub.config, "DEFAULT_KAGGLE_CREDENTIALS_FOLDER", str(home / ".kaggle"))
    server.home, server.out = home, tmp_path / "out"
    yield server
    server.shutdown()
    server.server_close()


def fetch(server, handle=HANDLE): return acquire(f"kaggle:{handle}", server.out, progress=False)


def fails(server, *says, **k):
    "One AcquireError that says what to do, writes nothing and shows no secret"
    with pytest.raises(AcquireError) as e: fetch(server, **k)
    text = str(e.value)
    assert not server.out.exists() and CANARY not in text and "\n" not in text and ":" in text
    for s in says: assert s in text, text
    return text


def test_kaggle_download(kaggle, tmp_path):
    m = fetch(kaggle)
    assert m.sha256 == build_manifest(folder(tmp_path / "set"), progress=False).sha256 and m.source == f"kaggle:{HANDLE}"
    assert m.leftovers == [("notes.txt", "not a picture")]
    assert json.loads((kaggle.out / "metadata.json").read_text())["acquired"]["version"] == 3
    assert [x[0] for x in kaggle.seen] == ["GetDataset", "DownloadDataset"]
    assert kaggle.seen[1][2] == dict(ownerSlug="owner", datasetSlug="brain-set", datasetVersionNumber=3)
    assert fetch(kaggle).sha256 == m.sha256 and len(kaggle.seen) == 2, "the second call asks nobody"


def test_kaggle_leaves_standard_output_to_the_caller(kaggle):
    code = ("import sys, kagglesdk.kaggle_env as k; k._env_to_endpoint[k.KaggleEnv.LOCAL] = sys.argv[1]; "
            "from phoenix.data.acquire import acquire; print(len(acquire(sys.argv[2], sys.argv[3], progress=False).table))")
    done = subprocess.run([sys.executable, "-c", code, kaggle.url, f"kaggle:{HANDLE}", str(kaggle.out)], capture_output=True,
                          text=True, timeout=120)
    assert done.stdout == "3\n", done.stderr


def test_kaggle_pinned_version(kaggle):
    acquire(f"kaggle:{HANDLE}/versions/2", kaggle.out, progress=False)
    assert kaggle.seen[-1][2]["datasetVersionNumber"] == 2
    with pytest.raises(AcquireError, match="name another"): acquire(f"kaggle:{HANDLE}/versions/1", kaggle.out, progress=False)


def test_kaggle_resumes(kaggle):
    kaggle.cut = 2_300_000
    fails(kaggle, "reachable", "run the same command again")
    kaggle.cut = 0
    assert len(fetch(kaggle).table) == 3
    assert kaggle.ranges[-1] and int(kaggle.ranges[-1][6:-1]) > 0, "the second call asked for the rest only"


def test_kaggle_wrong_bytes_against_the_checksum(kaggle):
    kaggle.archive = WHOLE_ARCHIVE[:-9] + b"X" + WHOLE_ARCHIVE[-8:]
    fails(kaggle, "checksum", "run the same command again")
    kaggle.archive = WHOLE_ARCHIVE
    assert len(fetch(kaggle).table) == 3


@pytest.mark.parametrize("body", [b"<html>Sign in</html>", b"PK\x03\x04" + bytes(100), WHOLE_ARCHIVE[:2_000_000], b""],
                         ids=["page", "stub", "cut", "empty"])
def test_kaggle_wrong_bytes_without_a_checksum(kaggle, body):
    kaggle.md5, kaggle.archive = False, body
    fails(kaggle, "whole archive")
    kaggle.archive = WHOLE_ARCHIVE
    assert len(fetch(kaggle).table) == 3, "the bad download is not resumed"


@pytest.mark.parametrize("call", ["view", "download"])
@pytest.mark.parametrize("status,says", [(401, ("refused them (401)", "kaggle.com/settings", "KAGGLE_USERNAME and KAGGLE_KEY")),
    (403, ("accept its terms", f"datasets/{HANDLE}")), (404, ("not found (404)", "check owner and name")),
    (429, ("wait 17 seconds",)), (500, ("failed with 500", "again")), (503, ("failed with 503",)), (418, ("answered 418",))])
def test_kaggle_statuses(kaggle, monkeypatch, call, status, says):
    monkeypatch.setenv("KAGGLE_USERNAME", "me")
    monkeypatch.setenv("KAGGLE_KEY", CANARY)
    setattr(kaggle, call, status)
    kaggle.headers = {"Retry-After": "17"}
    fails(kaggle, *says)
    kaggle.view = kaggle.download = 200
    assert len(fetch(kaggle).table) == 3


def test_kaggle_status_hidden_in_the_body(kaggle):
    kaggle.code_in_body = 404
    fails(kaggle, "not found (404)")


def test_kaggle_mistyped_handle(kaggle):
    kaggle.view = 404
    fails(kaggle, "did you mean 'masoudnickparvar/brain-tumor-mri-dataset'", handle="masoudnickparvar/brain-tumour-mri-dataset")
    for handle in ("brain", "a/b/c", "../x", "a/b/versions/x"): fails(kaggle, "kaggle:owner/name", handle=handle)
    assert len(kaggle.seen) == 1


def test_kaggle_unreachable(kaggle):
    kaggle.shutdown()
    kaggle.server_close()
    fails(kaggle, "reachable", "check network and proxy")


BASIC = "Basic " + base64.b64encode(f"me:{CANARY}".encode()).decode()
JSON = json.dumps(dict(username="me", key=CANARY))


@pytest.mark.parametrize("env,files,want,name", [
    (dict(KAGGLE_USERNAME="me", KAGGLE_KEY=CANARY), {}, BASIC, "KAGGLE_USERNAME and KAGGLE_KEY"),
    (dict(KAGGLE_API_TOKEN=CANARY), {}, f"Bearer {CANARY}", "KAGGLE_API_TOKEN"),
    ({"KAGGLE_API_TOKEN": "HOME/token"}, {"token": CANARY + "\n"}, f"Bearer {CANARY}", "KAGGLE_API_TOKEN"),
    ({}, {".kaggle/access_token": CANARY}, f"Bearer {CANARY}", "access_token"),
    ({}, {".kaggle/access_token.txt": CANARY}, f"Bearer {CANARY}", "access_token"),
    ({}, {".kaggle/kaggle.json": JSON}, BASIC, "kaggle.json"),
    (dict(KAGGLE_CONFIG_DIR="HOME/other"), {"other/kaggle.json": JSON}, BASIC, "kaggle.json"),
    (dict(KAGGLE_API_TOKEN=CANARY, KAGGLE_USERNAME="x", KAGGLE_KEY="y"), {".kaggle/kaggle.json": "{"}, f"Bearer {CANARY}", "KAGGLE_API_TOKEN"),
    (dict(KAGGLE_USERNAME="me", KAGGLE_KEY=CANARY), {".kaggle/kaggle.json": "{"}, BASIC, "KAGGLE_USERNAME and KAGGLE_KEY"),
    ({}, {}, "", "")])
def test_kaggle_credentials(kaggle, monkeypatch, env, files, want, name):
    for f, text in files.items():
        (kaggle.home / f).parent.mkdir(exist_ok=True)
        (kaggle.home / f).write_text(text)
    for k, v in env.items(): monkeypatch.setenv(k, v.replace("HOME", str(kaggle.home)))
    assert find_credentials() == name
    fetch(kaggle)
    assert {x[1] for x in kaggle.seen} == {want}, "phoenix names the credentials that kagglehub sends"


@pytest.mark.parametrize("env,text,says", [
    (dict(KAGGLE_USERNAME="me"), None, "KAGGLE_KEY is missing"), (dict(KAGGLE_KEY=CANARY), None, "KAGGLE_USERNAME is missing"),
    (dict(KAGGLE_USERNAME="me", KAGGLE_KEY="  "), None, "KAGGLE_KEY is missing"),
    ({}, '{"username": "me", "key": "' + CANARY, "readable JSON"), ({}, "", "readable JSON"), ({}, "\ufffd", "readable JSON"),
    ({}, json.dumps(dict(username="me")), "key is missing"), ({}, json.dumps(dict(key=CANARY)), "username is missing"),
    ({}, json.dumps(dict(username="", key=CANARY)), "username is missing"), ({}, json.dumps([CANARY]), "username and key"),
    ({"KAGGLE_API_TOKEN": "HOME/.kaggle/empty"}, None, "the file is empty")])
def test_kaggle_malformed_credentials(kaggle, monkeypatch, env, text, says):
    (kaggle.home / ".kaggle/empty").touch()
    if text is not None: (kaggle.home / ".kaggle/kaggle.json").write_text(text)
    for k, v in env.items(): monkeypatch.setenv(k, v.replace("HOME", str(kaggle.home)))
    fails(kaggle, says)
    assert not kaggle.seen, "nothing is sent with half a credential"


@pytest.mark.parametrize("status", [401, 403])
def test_kaggle_without_credentials(kaggle, status):
    kaggle.private = status
    fails(kaggle, "no credentials", "KAGGLE_API_TOKEN", "kaggle.com/settings")


def test_kaggle_archive_with_a_link(kaggle, tmp_path):
    path = tmp_path / "e.tar"
    with tarfile.open(path, "w") as t:
        for name, data in GOOD.items():
            i = tarfile.TarInfo(name)
            i.size = len(data)
            t.addfile(i, io.BytesIO(data))
        i = tarfile.TarInfo("Training/glioma/link.png")
        i.type, i.linkname = tarfile.SYMTYPE, "a.png"
        t.addfile(i)
    kaggle.md5, kaggle.archive = False, path.read_bytes()
    fails(kaggle, "is a link")


# ---- a storage that cuts, lies, changes and throttles


def says(handler, status, body=b"", **headers):
    "Answer with exactly these headers, whatever the body is, and hang up"
    handler.send_response(status)
    for k, v in {"Content-Type": "application/zip", "Accept-Ranges": "bytes", **headers}.items():
        if v is not None: handler.send_header(k.replace("_", "-"), v)
    handler.end_headers()
    handler.wfile.write(body)
    handler.close_connection = True


def cut(h, start, full, md5): says(h, 206 if start else 200, full[start:][:1_500_000], Content_Length=str(len(full) - start), **md5)
def says_more(h, start, full, md5): says(h, 200, full, Content_Length=str(len(full) + 1000), **md5)
def says_less(h, start, full, md5): says(h, 200, full, Content_Length=str(len(full) - 1000), **md5)
def no_length(h, start, full, md5): says(h, 200, full[:1_500_000], **md5)
def another(h, start, full, md5): says(h, 206 if start else 200, OTHER_ARCHIVE[start:], Content_Length=str(len(full) - start), ETag='"v2"', **md5)
def whole_again(h, start, full, md5): says(h, 200, full, Content_Length=str(len(full)), **md5)
def wrong_part(h, start, full, md5): says(h, 206, full[start - 700:], Content_Length=str(len(full) - start + 700), **md5)
def no_range(h, start, full, md5): says(h, 416, b"<html>416</html>", Content_Length="16")
def busy(h, start, full, md5): says(h, 503, b"<html>503</html>", Content_Length="16")
def throttled(h, start, full, md5): says(h, 429, b"<html>429</html>", Content_Length="16", Retry_After="3")
def not_there(h, start, full, md5): says(h, 404, b"<html>404</html>", Content_Length="16")
def page(h, start, full, md5): says(h, 200, b"<html>Sign in</html>", Content_Length="20")
def circle(h, start, full, md5): says(h, 302, Location=f"{h.server.url}/storage/archive.zip", Content_Length="0")
def packed(h, start, full, md5): says(h, 200, full, Content_Length=str(len(full)), Content_Encoding="gzip", **md5)
def empty(h, start, full, md5): says(h, 200, Content_Length="0")


def chunked_cut(h, start, full, md5):
    says(h, 200, b"%x\r\n" % 1_000_000 + full[:900_000], Transfer_Encoding="chunked", **md5)


def stalls(h, start, full, md5):
    says(h, 206 if start else 200, full[start:][:1_200_000], Content_Length=str(len(full) - start), **md5)
    h.wfile.flush()
    time.sleep(1)


def trickles(h, start, full, md5):
    body = full[start:]
    says(h, 206 if start else 200, Content_Length=str(len(body)), **md5)
    for k in range(0, len(body), 300_000):
        h.wfile.write(body[k:k + 300_000])
        time.sleep(.02)


FAULTS = {"cut": [cut], "cut twice": [cut, None, cut], "length too long": [says_more], "length too short": [says_less],
          "no length and cut": [no_length], "chunked and cut": [chunked_cut], "changed between two parts": [cut, None, another],
          "whole instead of the rest": [cut, None, whole_again], "a part from elsewhere": [cut, None, wrong_part],
          "refuses the range": [cut, None, no_range], "fails on the rest": [cut, None, busy], "busy, then well": [busy, busy],
          "too many requests": [throttled], "not there": [not_there], "a page": [page], "sends in a circle": [circle] * 40,
          "says it is packed": [packed], "empty": [empty], "stalls": [stalls], "trickles": [trickles]}


@pytest.mark.parametrize("md5", [True, False], ids=["checksum", "no checksum"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_storage_that_lies(kaggle, tmp_path, monkeypatch, name, md5):
    "Right bytes or a typed error, each time; never a part of a set in its place; right bytes once the storage is well"
    monkeypatch.setattr("kagglehub.clients.DEFAULT_READ_TIMEOUT", .4)
    kaggle.md5, kaggle.faults = md5, list(FAULTS[name])
    want, tries = build_manifest(folder(tmp_path / "set"), progress=False).sha256, 0
    before = {*tree(tmp_path)}
    for tries in range(1, 5):
        try: got = fetch(kaggle)
        except AcquireError as e:
            assert "\n" not in str(e) and not kaggle.out.exists() and tries < 4, str(e)
            left = {p.split("/")[0] for p in {*tree(tmp_path)} - before}
            assert left <= {"cache"}, "what has arrived stays in kagglehub's cache only"
        else: break
    assert got.sha256 == want and len(got.table) == 3
    assert {p.split("/")[0] for p in {*tree(tmp_path)} - before} <= {"cache", "out"}
    assert not [f for f in kaggle.faults if f and f is not circle], "the fault was met"


def test_another_archive_under_the_same_name(kaggle):
    "Against the checksum it is refused; without one nothing but the hashes that phoenix ships can tell, and they do"
    kaggle.faults = [another]
    fails(kaggle, "checksum")
    kaggle.md5, kaggle.faults = False, [another]
    m = fetch(kaggle, "sartajbhuvaji/brain-tumor-classification-mri")
    about = json.loads((kaggle.out / "metadata.json").read_text())
    assert "MIT" in about["licence"] and "Bhuvaji" in about["citation"] and about["acquired"]["version"] == 3
    found = audit(build_manifest(kaggle.out, progress=False))
    assert m.source == "kaggle:sartajbhuvaji/brain-tumor-classification-mri"
    assert "3264 published files are missing" in found.of("drift_missing")[0].message and len(found.of("drift_extra")[0].others) == 2


def test_kaggle_cache_that_cannot_be_written(kaggle, tmp_path):
    (tmp_path / "cache").write_text("a file")
    fails(kaggle, "KAGGLEHUB_CACHE")


def test_kagglehub_is_imported_inside_the_call_only(tmp_path):
    code = ("import sys, phoenix.data.acquire as a; a.acquire('phantom', sys.argv[1], patients=4, slices=1, size=32, progress=False); "
            "a.find_credentials({'HOME': '/nowhere'}); assert not {'kagglehub', 'kagglesdk', 'requests'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
