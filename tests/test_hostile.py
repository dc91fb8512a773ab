"Pictures made to break a decoder, read by a child under limits: no crash, no hang, no error without a name"
import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from phoenix.data.pixels import KINDS, pixels_sha256, read_pixels
from test_pixels import chunk, encoded, png, tiff

CHILD = Path(__file__).with_name("hostile_process.py")
RAMP = np.tile(np.arange(0, 240, 5, dtype="uint8"), (32, 1))
DEEP = RAMP.astype("uint16") * 257
NOISE = np.random.Generator(np.random.Philox(7)).integers(0, 256, (24, 20), dtype="uint8")
COLOUR = np.random.Generator(np.random.Philox(8)).integers(0, 256, (24, 20, 3), dtype="uint8")
JPEG, PNG, SIGNATURE = encoded(RAMP, "JPEG", quality=92), encoded(NOISE, "PNG"), b"\x89PNG\r\n\x1a\n"


def decode(items, folder, seconds=5.):
    "The outcome of each item: what the child said, or how it died over it; a child that dies is followed by another"
    path, found, peak, children = folder / "items.pickle", {}, 0, 0
    path.write_bytes(pickle.dumps(items))
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(CHILD.parents[1]), os.environ.get("PYTHONPATH", "")]))
    while len(found) < len(items) and children < 20:
        children += 1
        done = subprocess.run([sys.executable, str(CHILD), str(path), str(len(found)), str(seconds)], env=env, capture_output=True,
                              text=True, timeout=200)
        for line in done.stdout.splitlines():
            word, k, *rest = line.split()
            if word == "end": found[int(k)], peak = " ".join(rest[:-1]), max(peak, int(rest[-1]))
        if len(found) < len(items):
            assert "start" in done.stdout, done.stderr
            hung = done.returncode in (-signal.SIGALRM, -signal.SIGXCPU)
            found[len(found)] = f"{'hung' if hung else 'crashed'} {done.returncode}"
    return [found[k] for k in range(len(items))], peak, children


# ---- pictures made by hand


def luma(array): return np.asarray(Image.fromarray(array).convert("L"))


def as_pillow(data): return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").convert("L"))


def header(w, h, depth=8, colour=0, interlaced=0): return chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, interlaced))


def with_chunk(kind, body, data=PNG): return data[:33] + chunk(kind, body) + data[33:]


def adam7(grey):
    "An interlaced PNG: seven passes, each a picture of its own"
    rows = b""
    for x, y, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)):
        rows += b"".join(b"\0" + r.tobytes() for r in grey[y::dy, x::dx] if r.size)
    return SIGNATURE + header(grey.shape[1], grey.shape[0], interlaced=1) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def claims(data, w, h):
    "A JPEG whose header announces another size"
    at = data.index(b"\xff\xc0")
    return data[:at + 5] + struct.pack(">HH", h, w) + data[at + 9:]


def bmp(grey, w=None, h=None, top_down=False):
    "An 8-bit BMP by hand"
    rows = grey if top_down else grey[::-1]
    body = b"".join(r.tobytes().ljust(-(-grey.shape[1] // 4) * 4, b"\0") for r in rows)
    palette = b"".join(bytes((k, k, k, 0)) for k in range(256))
    info = struct.pack("<IiiHHIIiiII", 40, w or grey.shape[1], (h or grey.shape[0]) * (-1 if top_down else 1), 1, 8, 0, len(body), 0, 0, 256, 0)
    return struct.pack("<2sIHHI", b"BM", 14 + 40 + 1024 + len(body), 0, 0, 14 + 40 + 1024) + info + palette + body


def patched(data, at, form, *values):
    out = bytearray(data)
    struct.pack_into(form, out, at, *values)
    return bytes(out)


def tag(data, number):
    "Offset of a tag's entry in the first directory of a little-endian TIFF"
    at = struct.unpack_from("<I", data, 4)[0]
    return next(at + 2 + 12 * k for k in range(struct.unpack_from("<H", data, at)[0]) if struct.unpack_from("<H", data, at + 2 + 12 * k)[0] == number)


def loop(data):
    "A TIFF whose first directory is followed by itself"
    at = struct.unpack_from("<I", data, 4)[0]
    return patched(data, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], "<I", at)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(NOISE, "PNG", exif=exif)


def thumbnail():
    "A JPEG with another, whole JPEG inside its EXIF block"
    inner = encoded(255 - RAMP[:8, :8], "JPEG")
    body = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + inner
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + JPEG[2:]


ZEROS = zlib.compress(bytes(60_000_000), 9)
GREY_TIFF, PACKED_TIFF = tiff(NOISE), encoded(NOISE, "TIFF", compression="tiff_lzw")
FRAMES = dict(save_all=True, append_images=[Image.fromarray(255 - NOISE)])
CMYK = encoded(Image.fromarray(COLOUR).convert("CMYK"), "JPEG", quality=95)
HAND_MADE = {
    "nothing": (b"", "empty"), "one byte": (b"\xff", "not_an_image"), "zeros": (bytes(5000), "not_an_image"),
    "a web page": (b"<!DOCTYPE html><title>Sign in</title>", "not_an_image"), "a drawing in text": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
    "GIF": (encoded(NOISE, "GIF"), "unsupported"), "WebP": (encoded(NOISE, "WEBP"), "unsupported"),
    "DICOM": (bytes(128) + b"DICM" + bytes(300), "unsupported"), "a zip": (b"PK\x03\x04" + bytes(100), "unsupported"),
    "JPEG, half": (JPEG[:len(JPEG) // 2], "truncated"), "JPEG, signature alone": (b"\xff\xd8\xff", "truncated"),
    "JPEG, junk behind": (JPEG + b"junk" * 100, as_pillow(JPEG)), "JPEG, claims 65,535²": (claims(JPEG, 65535, 65535), "too_large"),
    "JPEG, claims no height": (claims(JPEG, 48, 0), "corrupt"), "JPEG, claims more rows": (claims(JPEG, 48, 4000), "truncated"),
    "JPEG, CMYK": (CMYK, as_pillow(CMYK)), "JPEG, a picture inside": (thumbnail(), as_pillow(JPEG)),
    "JPEG, two pictures": (encoded(NOISE, "MPO", "RGB", save_all=True, append_images=[Image.fromarray(NOISE).convert("RGB")]), "multi_frame"),
    "PNG, called .jpg": ((".jpg", PNG), NOISE), "PNG, junk behind": (PNG + b"junk", NOISE), "PNG, interlaced": (adam7(NOISE), NOISE),
    "PNG, interlaced and cut": (adam7(NOISE)[:-40], "truncated"), "PNG, wrong checksum": (patched(PNG, len(PNG) - 14, "B", PNG[-14] ^ 1), "corrupt"),
    "PNG, no end": (PNG[:-12], "truncated"), "PNG, chunk of 4 GiB": (patched(PNG, 33, ">I", 0xFFFFFFFF), "truncated"),
    "PNG, no width": (SIGNATURE + header(0, 9) + PNG[33:], "corrupt"), "PNG, 50,000²": (SIGNATURE + header(50000, 50000) + PNG[33:], "too_large"),
    "PNG, more rows than pixels": (SIGNATURE + header(20, 4000) + PNG[33:], "truncated"),
    "PNG, 60 MB in 60 KB of pixels": (SIGNATURE + header(100, 100) + chunk(b"IDAT", ZEROS) + chunk(b"IEND", b""), np.zeros((100, 100), "uint8")),
    "PNG, 60 MB of text": (with_chunk(b"zTXt", b"a\0\0" + ZEROS), "corrupt"), "PNG, 60 MB of profile": (with_chunk(b"iCCP", b"a\0\0" + ZEROS), "corrupt"),
    "PNG, palette": (encoded(Image.fromarray(RAMP).convert("P"), "PNG"), RAMP), "PNG, 1 bit": (encoded(Image.fromarray(NOISE > 127), "PNG"), (NOISE > 127) * np.uint8(255)),
    "PNG, 16 bits": (encoded(DEEP, "PNG"), DEEP), "PNG, 16-bit colour": (png(COLOUR.astype("uint16") * 257, 2), "unsupported"),
    "PNG, turned": (turned(6), np.rot90(NOISE, -1)), "PNG, animated": (encoded(NOISE, "PNG", **FRAMES), "multi_frame"),
    "TIFF, float": (encoded(NOISE.astype("float32"), "TIFF"), "unsupported"), "TIFF, 32 bits": (encoded(NOISE.astype("int32"), "TIFF"), "unsupported"),
    "TIFF, 16 bits, big-endian": (tiff(DEEP, end=">"), DEEP), "TIFF, white is 0": (tiff(255 - RAMP, photometric=0), RAMP),
    "TIFF, two pages": (encoded(NOISE, "TIFF", **FRAMES), "multi_frame"), "TIFF, directory of itself": (loop(GREY_TIFF), NOISE),
    "TIFF, pixels outside": (patched(GREY_TIFF, tag(GREY_TIFF, 273) + 8, "<I", 10 ** 6), "truncated"),
    "TIFF, 4 GiB of entries": (patched(GREY_TIFF, tag(GREY_TIFF, 273) + 4, "<I", 0xFFFFFFFF), "unsupported"),
    "TIFF, 60,000²": (patched(patched(GREY_TIFF, tag(GREY_TIFF, 256) + 8, "<H", 60000), tag(GREY_TIFF, 257) + 8, "<H", 60000), "too_large"),
    "TIFF, no width": (patched(GREY_TIFF, tag(GREY_TIFF, 256) + 8, "<H", 0), "unsupported"),
    "TIFF, directory outside": (patched(GREY_TIFF, 4, "<I", 10 ** 6), "truncated"), "TIFF, packed and cut": (PACKED_TIFF[:60], "truncated"),
    "BMP, from the top": (bmp(NOISE, top_down=True), NOISE), "BMP, colour": (encoded(COLOUR, "BMP"), luma(COLOUR)),
    "BMP, 40,000²": (bmp(NOISE, 40000, 40000), "too_large"), "BMP, cut": (bmp(NOISE)[:-100], "truncated"), "BMP, no height": (patched(bmp(NOISE), 22, "<i", 0), "corrupt")}


def test_pictures_made_by_hand(tmp_path):
    "Each gives exactly the pixels it holds, or the kind of refusal that fits"
    items = []
    for k, (data, _) in enumerate(HAND_MADE.values()):
        if isinstance(data, tuple):
            (tmp_path / f"{k}{data[0]}").write_bytes(data[1])
            data = tmp_path / f"{k}{data[0]}"
        items.append(data)
    got, peak, children = decode(items, tmp_path)
    want = [f"refused {e}" if isinstance(e, str) else f"pixels {pixels_sha256(np.ascontiguousarray(e))}" for _, e in HAND_MADE.values()]
    assert {w.split()[1] for w in want if w.startswith("refused")} <= set(KINDS)
    wrong = {n: (w, g) for n, w, g in zip(HAND_MADE, want, got) if w != g}
    print(f"{len(items)} pictures made by hand, {len(items) - len(wrong)} as expected, at most {peak} MiB")
    assert not wrong and children == 1 and len(items) >= 40
    assert peak < 600, "no bomb was unpacked"


# ---- seeded mutants

SEEDS = {"JPEG": JPEG, "JPEG, colour": encoded(COLOUR, "JPEG", quality=80), "JPEG, progressive": encoded(NOISE, "JPEG", progressive=True),
         "JPEG, CMYK": CMYK, "PNG": PNG, "PNG, 16 bits": encoded(DEEP, "PNG"), "PNG, interlaced": adam7(RAMP), "PNG, palette": encoded(Image.fromarray(RAMP).convert("P"), "PNG"),
         "TIFF": GREY_TIFF, "TIFF, LZW": PACKED_TIFF, "TIFF, deflate": encoded(RAMP, "TIFF", compression="tiff_deflate"), "TIFF, 16 bits": tiff(DEEP),
         "TIFF, JPEG": encoded(NOISE, "TIFF", compression="jpeg"), "BMP": bmp(NOISE), "BMP, colour": encoded(COLOUR, "BMP")}


def flip(g, data, other):
    out = bytearray(data)
    for k in g.integers(0, len(out), int(g.integers(1, 12))): out[k] ^= 1 << int(g.integers(0, 8))
    return bytes(out)


def extreme(g, data, other):
    "A number somewhere becomes the largest, the smallest or a huge one"
    at, n = int(g.integers(0, len(data))), int(g.choice([1, 2, 4]))
    return data[:at] + [b"\xff", b"\0", b"\x7f", b"\x80"][int(g.integers(0, 4))] * n + data[at + n:]


def delete(g, data, other):
    a, n = int(g.integers(0, len(data))), int(g.integers(1, 60))
    return data[:a] + data[a + n:]


def double(g, data, other):
    a, n = int(g.integers(0, len(data))), int(g.integers(1, 200))
    return data[:a + n] + data[a:a + n] * int(g.integers(1, 4)) + data[a + n:]


def splice(g, data, other): return data[:int(g.integers(4, len(data)))] + other[int(g.integers(0, len(other))):]


def head(g, data, other):
    "The same flips, but where sizes and types stand"
    out = bytearray(data)
    for k in g.integers(0, min(len(out), 80), int(g.integers(1, 6))): out[k] = int(g.integers(0, 256))
    return bytes(out)


MUTATIONS = (flip, extreme, delete, double, splice, head)


def mutants(n):
    "n pairs of a seed's name and its mutant, the same on every machine"
    names = list(SEEDS)
    for k in range(n):
        g = np.random.Generator(np.random.Philox(key=[2000, k]))
        name, other = names[k % len(names)], names[int(g.integers(0, len(names)))]
        yield name, MUTATIONS[k // len(names) % len(MUTATIONS)](g, SEEDS[name], SEEDS[other])


def test_two_thousand_mutants(tmp_path):
    "0 crashes, 0 hangs, 0 errors without a name; and what a PNG lets through is its picture, for it has checksums"
    pairs = list(mutants(2000))
    got, peak, children = decode([data for _, data in pairs], tmp_path)
    count = Counter(g.split()[0] for g in got)
    kinds = Counter(g.split()[1] for g in got if g.startswith("refused"))
    print(f"{len(pairs)} mutants: {dict(count)}, refused as {dict(kinds)}, at most {peak} MiB, {children} child")
    bad = [(k, pairs[k][0], g) for k, g in enumerate(got) if g.split()[0] not in ("pixels", "refused")]
    assert not bad and sum(count.values()) == 2000 and set(kinds) <= set(KINDS)
    own = {f"pixels {pixels_sha256(read_pixels(d).grey)}" for d in SEEDS.values()}
    assert not [k for k, ((name, _), g) in enumerate(zip(pairs, got)) if name.startswith("PNG") and g.startswith("pixels") and g not in own]
    assert count["refused"] > 1000 and len(kinds) >= 4, "the mutations reach the decoder's many ways out"


def test_a_death_over_an_item_is_seen(tmp_path):
    "The harness names the item over which a child crashed or hung, and goes on with the next"
    from hostile_process import Abort
    got, _, children = decode([PNG, Abort(), b"", Abort(), PNG], tmp_path)
    assert [g.split()[0] for g in got] == ["pixels", "crashed", "refused", "crashed", "pixels"] and children == 3
    got, _, _ = decode([encoded(np.zeros((4000, 4000), "uint8"), "PNG"), b""], tmp_path, seconds=.002)
    assert got[0].startswith("hung") and got[1] == "refused empty"
