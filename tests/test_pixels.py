"A hostile corpus, made here and now: what the decoder is fed in the wild, at every byte"
import copy
import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from phoenix.data import pixels
from phoenix.data.pixels import FORMATS, KINDS, PixelError, pixels_sha256, read_pixels
from phoenix.settings import PhoenixError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow narrates what phoenix refuses
RAMP = np.tile(np.arange(0, 240, 5, dtype="uint8"), (32, 1))
SQUARE = np.zeros((32, 32), "uint8")
SQUARE[8:20, 10:24] = 200
DEEP = RAMP.astype("uint16") * 257
NOISE = np.random.Generator(np.random.Philox(7)).integers(0, 256, (24, 20), dtype="uint8")


def encoded(array, format, mode=None, **options):
    b, im = io.BytesIO(), array if isinstance(array, Image.Image) else Image.fromarray(array)
    (im.convert(mode) if mode else im).save(b, format, **options)
    return b.getvalue()


def chunk(kind, body): return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(array, colour, depth=16):
    "A PNG written by hand: Pillow cannot write 16-bit colour"
    h, w = array.shape[:2]
    rows = b"".join(b"\0" + array[y].astype(">u2" if depth == 16 else "u1").tobytes() for y in range(h))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def tiff(array, photometric=1, sample_format=1, orientation=1, samples=1, end="<"):
    "A minimal TIFF, one strip: the tags no writer offers"
    h, w = array.shape[:2]
    bits, data = array.dtype.itemsize * 8, array.astype(array.dtype.newbyteorder(end)).tobytes()
    tags = sorted([(256, w), (257, h), (258, bits), (259, 1), (262, photometric), (274, orientation), (277, samples),
                   (278, h), (339, sample_format), (273, 8), (279, len(data))])
    out = (b"II*\0" if end == "<" else b"MM\0*") + struct.pack(end + "I", 8 + len(data)) + data + struct.pack(end + "H", len(tags))
    for tag, v in tags:
        out += struct.pack(end + "HHI", tag, 4 if tag in (273, 279) else 3, 1)
        out += struct.pack(end + "I", v) if tag in (273, 279) else struct.pack(end + "HH", v, 0)
    return out + struct.pack(end + "I", 0)


WHOLE = {("JPEG", "noise"): encoded(NOISE, "JPEG", quality=92), ("JPEG", "colour"): encoded(NOISE, "JPEG", "RGB"),
         ("JPEG", "progressive"): encoded(NOISE, "JPEG", progressive=True), ("PNG", "noise"): encoded(NOISE, "PNG"),
         ("PNG", "square"): encoded(SQUARE, "PNG"), ("TIFF", "noise"): encoded(NOISE, "TIFF"),
         ("TIFF", "lzw"): encoded(SQUARE, "TIFF", compression="tiff_lzw"), ("BMP", "noise"): encoded(NOISE, "BMP"),
         ("PNG", "16"): encoded(DEEP, "PNG"), ("TIFF", "16"): tiff(DEEP)}
each_whole = pytest.mark.parametrize("name", list(WHOLE), ids="-".join)


def refusal(data, **k):
    "The kind of refusal, or None when the picture is accepted"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: read_pixels(data, **k)
        except PixelError as e:
            assert e.kind in KINDS and str(e)
            return e.kind


@each_whole
def test_every_prefix_is_refused(name):
    data = WHOLE[name]
    whole = read_pixels(data).grey
    for n in range(len(data)):
        try: cut = read_pixels(data[:n]).grey
        except PixelError as e: assert e.kind in KINDS
        else: assert np.array_equal(cut, whole), f"{n} of {len(data)} bytes gave other pixels and no refusal"
    kinds = {refusal(data[:n]) for n in range(len(data) // 3, len(data) // 2)}
    assert kinds <= {"truncated", "corrupt", "unsupported"} and "truncated" in kinds | {refusal(data[:-8])}


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "packbits"])
def test_a_tiff_cut_in_its_pixels_is_truncated(compression):
    data = encoded(NOISE, "TIFF", **({"compression": compression} if compression else {}))
    directory = struct.unpack("<I", data[4:8])[0]
    entries = struct.unpack_from("<H", data, directory)[0]
    moved = data[:4] + struct.pack("<I", 8) + data[directory:directory + 2 + 12 * entries + 4]
    shift = len(moved) - 8
    out = bytearray(moved + data[8:])
    for k in range(entries):
        at = 10 + 12 * k
        tag, kind, n, value = struct.unpack_from("<HHII", out, at)
        if tag == 273 or n * {1: 1, 2: 1, 3: 2, 4: 4, 5: 8}[kind] > 4: struct.pack_into("<HHII", out, at, tag, 4 if tag == 273 else kind, n, value + shift)
    np.testing.assert_array_equal(read_pixels(bytes(out)).grey, NOISE)
    pixels_end = max(v for v in range(len(out), 0, -1) if refusal(bytes(out[:v])) is not None)
    assert refusal(bytes(out[:pixels_end])) == "truncated" and refusal(bytes(out[:len(moved) + 40])) == "truncated"


@pytest.mark.parametrize("name", [("PNG", "noise"), ("PNG", "square"), ("PNG", "16")], ids="-".join)
def test_every_flipped_bit_of_a_png_is_refused(name):
    data = WHOLE[name]
    for k in range(len(data)):
        bad = bytearray(data)
        bad[k] ^= 1 << k % 8
        assert refusal(bytes(bad)) is not None, f"byte {k}"


def test_fuzz_ends_in_pixels_or_a_typed_refusal():
    rng = np.random.Generator(np.random.Philox(11))
    for data in WHOLE.values():
        for _ in range(150):
            bad = bytearray(data)
            for k in rng.integers(0, len(bad), int(rng.integers(1, 12))): bad[k] = int(rng.integers(0, 256))
            refusal(bytes(bad))


def test_random_bytes_behind_each_signature():
    rng = np.random.Generator(np.random.Philox(12))
    for head in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"BM" + bytes(12) + b"\x28\0\0\0"):
        for n in (0, 1, 20, 400):
            assert refusal(head + rng.bytes(n)) in {"corrupt", "truncated", "unsupported", "too_large"}


@pytest.mark.parametrize("data,kind", [
    (b"", "empty"), (b"\0" * 500, "not_an_image"), (b"<!DOCTYPE html><title>403</title>", "not_an_image"),
    (encoded(NOISE, "GIF"), "unsupported"), (encoded(NOISE, "WEBP"), "unsupported"), (b"%PDF-1.7", "unsupported"),
    (b"\0" * 128 + b"DICM", "unsupported"), (b"\0" * 344 + b"n+1\0", "unsupported"), (b"\x1f\x8b\x08" + b"\0" * 9, "unsupported"),
    (encoded(np.zeros((4, 4), "float32"), "TIFF"), "unsupported"), (encoded(np.zeros((4, 4), "int32"), "TIFF"), "unsupported"),
    (tiff(np.zeros((4, 4), "int16"), sample_format=2), "unsupported"),
    (encoded(Image.new("LAB", (4, 4)), "TIFF"), "unsupported"),
    (png(np.zeros((4, 4, 3)), 2), "unsupported"), (png(np.zeros((4, 4, 4)), 6), "unsupported"), (png(np.zeros((4, 4, 2)), 4), "unsupported"),
    (encoded(NOISE, "TIFF", save_all=True, append_images=[Image.fromarray(NOISE)]), "multi_frame"),
    (encoded(NOISE, "PNG", save_all=True, append_images=[Image.fromarray(255 - NOISE)]), "multi_frame"),
    (encoded(NOISE, "MPO", "RGB", save_all=True, append_images=[Image.fromarray(NOISE).convert("RGB")]), "multi_frame"),
])
def test_refused_by_type(data, kind):
    assert refusal(data) == kind


@pytest.mark.parametrize("w,h", [(8000, 10000), (20000, 20000), (2 ** 31 - 1, 2 ** 31 - 1)])
def test_bombs_are_stopped_by_their_header(w, h, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a bomb was decoded"))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    assert refusal(bomb) == "too_large"


def test_cap_is_a_choice():
    assert refusal(WHOLE["PNG", "noise"], max_megapixels=.0001) == "too_large"
    assert refusal(WHOLE["PNG", "noise"], max_megapixels=.00048) is None


def test_long_files_are_not_read(tmp_path):
    f = tmp_path / "long.png"
    with f.open("wb") as h: h.truncate(40 * 2 ** 20)
    assert refusal(f, max_megapixels=1) == "too_large"


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for p in (tmp_path, tmp_path / "nowhere.png", tmp_path / "pipe.png"): assert refusal(p) == "missing"


def test_the_same_picture_in_many_containers():
    ways = [encoded(RAMP, f, m) for f, modes in {"PNG": (None, "RGB", "RGBA", "LA", "P"), "BMP": (None, "RGB"),
            "TIFF": (None, "RGB", "RGBA", "LA")}.items() for m in modes]
    ways += [tiff(255 - RAMP, photometric=0), tiff(RAMP, end=">"), encoded(RAMP, "PNG", "RGB", exif=Image.Exif())]
    for data in ways: np.testing.assert_array_equal(read_pixels(data).grey, RAMP)
    assert len({pixels_sha256(read_pixels(d).grey) for d in ways}) == 1


def test_colour_is_pillows_luma():
    rgb = np.random.Generator(np.random.Philox(3)).integers(0, 256, (40, 30, 3), dtype="uint8")
    for f in ("PNG", "BMP", "TIFF", "JPEG"):
        data = encoded(rgb, f)
        want = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        np.testing.assert_array_equal(read_pixels(data).grey, want)
    cmyk = encoded(rgb, "TIFF", "CMYK")
    np.testing.assert_array_equal(read_pixels(cmyk).grey, np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB").convert("L")))


def fitted(grey, **options):
    "A grey picture stored in colour, with Huffman tables fitted to it"
    return encoded(grey, "JPEG", "RGB", optimize=True, **options)


def by_pillow(data): return np.asarray(Image.open(io.BytesIO(data)).convert("L"))


@pytest.mark.parametrize("options", [dict(subsampling=0), dict(subsampling=1, quality=30), dict(subsampling=2, quality=98),
                                     dict(restart_marker_blocks=2), dict(quality=60, comment=b"\xff\xc4 is no table")])
def test_a_header_that_proves_grey_changes_no_value(options):
    for grey in (RAMP, SQUARE, NOISE, NOISE[:7, :9], np.full((16, 8), 255, "uint8")):
        data = fitted(grey, **options)
        assert pixels._has_no_colour(data)
        p = read_pixels(data)
        np.testing.assert_array_equal(p.grey, by_pillow(data))
        assert (p.mode, p.conversion) == ("RGB", "luma")


def test_a_header_that_proves_nothing_is_not_believed():
    data, adobe = fitted(NOISE), b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0" # channels are red, green and blue
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    jfif = data[4:20]
    bare = data.replace(b"\xff\xe0" + data[4:20], b"", 1)
    named = bytearray(bare)
    for at, step in ((bare.index(b"\xff\xc0") + 10, 3), (bare.index(b"\xff\xda") + 5, 2)):
        named[at:at + 3*step:step] = b"RGB"
    assert data[frame + 10:frame + 19:3] == data[scan + 5:scan + 11:2] == b"\1\2\3" and jfif[2:6] == b"JFIF"
    more = b"\xff\xc4\0\x15\x11\1\1" + bytes(14) + b"\0\1" # one more colour coefficient has a code
    tinted = np.dstack([NOISE]*3)
    tinted[:8, :8, 0] //= 2
    doubted = [bare[:2] + adobe + bare[2:], bytes(named), data[:scan] + more + data[scan:], encoded(tinted, "JPEG", optimize=True),
               encoded(NOISE, "JPEG", "RGB"), fitted(NOISE, progressive=True), encoded(NOISE, "JPEG", optimize=True)]
    assert not any(pixels._has_no_colour(d) for d in doubted[:-2] + doubted[-1:])
    for d in doubted: np.testing.assert_array_equal(read_pixels(d).grey, by_pillow(d))
    assert (read_pixels(doubted[0]).grey != read_pixels(data).grey).any() and pixels._has_no_colour(bare)


def test_damage_has_the_same_end_with_and_without_the_proof(monkeypatch):
    "Mutants of files that are decoded for their brightness end as they do when all channels are decoded"
    g, believe, ends = np.random.Generator(np.random.Philox(11)), pixels._has_no_colour, []
    def end(data):
        try: return pixels_sha256(read_pixels(data).grey)
        except PixelError as e: return e.kind
    for k in range(300):
        data = bytearray(fitted((RAMP, SQUARE, NOISE)[k % 3], subsampling=k % 2*2))
        start = data.index(b"\xff\xda") if k % 4 else 2
        for at in g.integers(start, len(data), 1 + k % 3): data[at] = g.integers(0, 256)
        monkeypatch.setattr(pixels, "_has_no_colour", believe)
        ends.append((believe(data), end(data)))
        monkeypatch.setattr(pixels, "_has_no_colour", lambda data: False)
        assert end(data) == ends[-1][1], k
    assert sum(proven and len(e) == 64 for proven, e in ends) > 50 and sum(len(e) < 64 for _, e in ends) > 20


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_is_black(mode):
    im = Image.fromarray(np.dstack([RAMP, RAMP, RAMP, np.where(SQUARE[:, :1] > 0, 0, 255) + np.zeros_like(RAMP)]).astype("uint8"))
    im.putalpha(Image.fromarray(np.where(np.arange(48) < 24, 0, 255)[None].repeat(32, 0).astype("uint8")))
    p = read_pixels(encoded(im, "TIFF" if mode == "PA" else "PNG", mode))
    assert (p.grey[:, :24] == 0).all() and (p.grey[:, 25:] > 0).all() and "over black" in p.conversion


def test_transparent_key_of_a_palette_is_black():
    im = Image.fromarray(RAMP).convert("P")
    p = read_pixels(encoded(im, "PNG", transparency=im.getpixel((47, 0))))
    assert p.grey[0, 47] == 0 and p.grey[0, 46] == RAMP[0, 46]


def test_one_bit():
    bit = SQUARE > 0
    for f in ("PNG", "BMP", "TIFF"):
        p = read_pixels(encoded(Image.fromarray(bit), f))
        np.testing.assert_array_equal(p.grey, bit * np.uint8(255))
        assert p.bits == 1


@pytest.mark.parametrize("end", ["<", ">"])
def test_sixteen_bits_keep_every_value(end):
    deep = np.arange(0, 65536, 33, dtype="uint16")[:1900].reshape(38, 50)
    for data in (tiff(deep, end=end), encoded(deep, "PNG"), encoded(deep, "TIFF", compression="tiff_deflate"), png(deep, 0)):
        p = read_pixels(data)
        assert (p.grey.dtype, p.bits) == (np.uint16, 16)
        np.testing.assert_array_equal(p.grey, deep)


def test_sixteen_bit_min_is_white_is_inverted():
    deep = np.arange(12, dtype="uint16").reshape(3, 4) * 5000
    p = read_pixels(tiff(deep, photometric=0))
    np.testing.assert_array_equal(p.grey, 65535 - deep)
    assert "min-is-white" in p.conversion


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "TIFF16"])
def test_orientation(orientation, kind):
    want = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
            6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T, 8: np.rot90}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "TIFF16": image, data = (a := DEEP), tiff(a, orientation=orientation)
    elif kind == "TIFF": image, data = RAMP, tiff(RAMP, orientation=orientation)
    else: image, data = RAMP, encoded(RAMP, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {}))
    p = read_pixels(data)
    assert p.grey.shape == want(image).shape == (p.height, p.width) and p.turned == (orientation > 1)
    assert np.abs(p.grey.astype(int) - want(image).astype(int)).max() <= (2 if kind == "JPEG" else 0)


def test_truncated_images_flag_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(PhoenixError, match="LOAD_TRUNCATED_IMAGES"): read_pixels(WHOLE["JPEG", "noise"])


def test_refusals_cross_processes():
    e = copy.deepcopy(PixelError("why", "truncated"))  # the protocol of pickle, which worker processes use
    assert (str(e), e.kind) == ("why", "truncated")


@pytest.mark.data
def test_real_images_are_luma_and_whole(real_data):
    files = sorted((real_data / "sartajbhuvaji").rglob("*.jpg"))[::40] + sorted((real_data / "clean4").rglob("*.jpg"))[::40]
    for f in files:
        p = read_pixels(f)
        np.testing.assert_array_equal(p.grey, np.asarray(Image.open(f).convert("L")))
        assert p.format in FORMATS and not p.turned
    assert len(files) > 100
