"The cache under races, kills, damage, change and a full disk: a wrong item never leaves it."
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import tempfile
import time
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phoenix.data import loaders
from phoenix.data.acquire import build_manifest
from phoenix.data.loaders import Cache, LoaderError, build_cache
from phoenix.data.preprocess import Preprocess

PREPROCESS = Preprocess(size=(24, 32))
N = 12


def write_pictures(root, n=N, seed=0):
    "n different smooth pictures in two class folders"
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:40, :48]
    for i in range(n):
        a, b, c = rng.uniform(.05, .4, 3)
        head = ((x - 24)**2/400 + (y - 20)**2/300 < 1)*(120 + 60*np.sin(a*x + b*y + 9*c))
        folder = root/('glioma' if i % 2 else 'pituitary')
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(head.astype(np.uint8)).save(folder/f'{i:02d}.png')
    return root


@pytest.fixture
def manifest(tmp_path):
    return build_manifest(write_pictures(tmp_path/'raw'), progress=False)


@pytest.fixture
def truth(manifest):
    "What each item has to be, made without a cache"
    return np.stack([loaders._prepare(manifest.root, row, PREPROCESS) for row in manifest.table.itertuples()])


def built(manifest, folder, preprocess=PREPROCESS):
    return build_cache(manifest, preprocess, folder, progress=False)


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.suffix not in ('.pixels', '.lock')]


FORK = multiprocessing.get_context('fork') # children start at once, with everything imported


def writer(raw, folder, pause, answers, together):
    "What a writing process does: build slowly, then say how many items it made and what it sees"
    prepare = loaders._prepare
    def slow(*args):
        time.sleep(pause)
        return prepare(*args)
    loaders._prepare = slow
    manifest = build_manifest(raw, progress=False)
    together.wait()
    cache = build_cache(manifest, PREPROCESS, folder, workers=1, progress=False)
    answers.put((cache.computed, zlib.crc32(cache.images(manifest.table.path))))


def start_writers(n, raw, folder, pause):
    "n processes that begin to build at the same moment"
    answers, together = FORK.Queue(), FORK.Barrier(n)
    started = [FORK.Process(target=writer, args=(raw, folder, pause, answers, together), daemon=True) for _ in range(n)]
    for p in started: p.start()
    return started, answers


def test_first_call_makes_all_and_second_none(manifest, truth, tmp_path):
    first, second = built(manifest, tmp_path/'cache'), built(manifest, tmp_path/'cache')
    assert (first.computed, first.damaged, second.computed, second.damaged) == (N, 0, 0, 0)
    for cache in (first, second): assert np.array_equal(cache.images(manifest.table.path), truth)
    backwards = list(manifest.table.path)[::-1]
    assert np.array_equal(second.images(backwards), truth[::-1])


DAMAGE = {'magic': (0, N), 'header': (60, N), 'padding': (4095, N), 'first pixel': ('pixels', 1), 'last pixel': ('last', 1),
          'checksum': ('end', N), 'footer': (-1, N)}


@pytest.mark.parametrize('where', DAMAGE)
def test_one_wrong_bit_anywhere(where, manifest, truth, tmp_path):
    cache = built(manifest, tmp_path/'cache')
    at, remade = DAMAGE[where]
    at = {'pixels': len(cache.layout.head), 'last': cache.layout.end - 1, 'end': cache.layout.end}.get(at, at)
    data = bytearray(cache.path.read_bytes())
    data[at] ^= 16
    cache.path.write_bytes(data)
    repaired = built(manifest, tmp_path/'cache')
    assert (repaired.computed, repaired.damaged) == (remade, remade)
    assert np.array_equal(repaired.images(manifest.table.path), truth)
    assert built(manifest, tmp_path/'cache').computed == 0


@pytest.mark.parametrize('change', ['empty', 'truncated', 'longer', 'zeros', 'items swapped', 'folder of the old'])
def test_other_damage(change, manifest, truth, tmp_path):
    cache = built(manifest, tmp_path/'cache')
    data, at, size = cache.path.read_bytes(), len(cache.layout.head), 24*32
    swapped = data[:at] + data[at + size:at + 2*size] + data[at:at + size] + data[at + 2*size:]
    new = {'empty': b'', 'truncated': data[:-100], 'longer': data + b'x', 'zeros': bytes(len(data)), 'items swapped': swapped,
           'folder of the old': data.replace(b'"layout": 1', b'"layout": 0')}[change]
    assert new != data
    cache.path.write_bytes(new)
    repaired = built(manifest, tmp_path/'cache')
    assert repaired.damaged == (2 if change == 'items swapped' else N)
    assert np.array_equal(repaired.images(manifest.table.path), truth)


def test_damage_under_an_open_cache_is_never_handed_out(manifest, truth, tmp_path):
    cache = built(manifest, tmp_path/'cache')
    cache.images(manifest.table.path)
    with open(cache.path, 'r+b') as f:
        f.seek(len(cache.layout.head))
        f.write(bytes(255 - b for b in truth[:3].tobytes()))
    assert np.array_equal(cache.images(manifest.table.path), truth)
    assert cache.damaged == 3


def test_another_spec_size_or_code_is_another_file(manifest, tmp_path, monkeypatch):
    one = built(manifest, tmp_path/'cache')
    others = [built(manifest, tmp_path/'cache', replace(PREPROCESS, **k)) for k in (dict(clip=95.), dict(size=(32, 24)), dict(clahe=True))]
    assert len({c.path for c in [one, *others]}) == 4
    assert all(c.computed == N for c in others)
    monkeypatch.setattr(Preprocess, 'digest', property(lambda self: 'a later version of the code'))
    later = built(manifest, tmp_path/'cache')
    assert later.computed == N and later.path not in {c.path for c in [one, *others]}


def test_changed_pictures_are_other_items(manifest, truth, tmp_path):
    built(manifest, tmp_path/'cache')
    write_pictures(manifest.root, seed=1)
    newer = build_manifest(manifest.root, progress=False)
    cache = built(newer, tmp_path/'cache')
    assert cache.computed == N
    assert not np.array_equal(cache.images(newer.table.path), truth)


def test_a_picture_that_changed_or_vanished_stops_the_build(manifest, tmp_path):
    victim = manifest.root/manifest.table.path[5]
    kept = victim.read_bytes()
    for change, message in ((lambda: victim.write_bytes(kept + b'x'), 'bytes its manifest records'), (victim.unlink, 'is missing')):
        change()
        with pytest.raises(LoaderError, match=f'{victim.name}.*{message}'): built(manifest, tmp_path/'cache')
        assert list((tmp_path/'cache').glob('*.pixels')) == [] and leftovers(tmp_path/'cache') == []
    victim.write_bytes(kept)
    assert built(manifest, tmp_path/'cache').computed == N


def test_equal_pictures_share_an_item(manifest, tmp_path):
    first = manifest.root/manifest.table.path[0]
    Image.open(first).save(first.with_name('copy.bmp'))
    twice = build_manifest(manifest.root, progress=False)
    cache = built(twice, tmp_path/'cache')
    assert (len(twice.table), len(cache)) == (N + 1, N)
    a, b = cache.images([manifest.table.path[0], str(Path(manifest.table.path[0]).with_name('copy.bmp').as_posix())])
    assert np.array_equal(a, b)


def test_unreadable_pictures_are_left_out(manifest, tmp_path):
    (manifest.root/'glioma'/'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n')
    found = build_manifest(manifest.root, progress=False)
    cache = built(found, tmp_path/'cache')
    assert len(cache) == N
    with pytest.raises(LoaderError, match='broken.png must be a readable file'): cache.image('glioma/broken.png')
    nothing = replace(found, table=found.table[found.table.problem != ''])
    with pytest.raises(LoaderError, match='at least one readable picture'): built(nothing, tmp_path/'cache')


def test_travels_to_another_process_without_its_pixels(manifest, truth, tmp_path):
    cache = built(manifest, tmp_path/'cache')
    cache.images(manifest.table.path)
    packed = pickle.dumps(cache)
    assert len(packed) < 50_000 + len(truth.tobytes())
    assert np.array_equal(pickle.loads(packed).images(manifest.table.path), truth)
    assert isinstance(cache, Cache) and cache.__getstate__()['_pixels'] is None


def test_four_writers_at_once_make_each_item_once(manifest, truth, tmp_path):
    writers, answers = start_writers(4, manifest.root, tmp_path/'cache', .02)
    got = [answers.get(timeout=60) for _ in writers]
    for w in writers: w.join(30)
    assert sorted(n for n, _ in got) == [0, 0, 0, N]
    assert {crc for _, crc in got} == {zlib.crc32(truth)}
    assert leftovers(tmp_path/'cache') == []


@pytest.mark.parametrize('before', ['nothing', 'a damaged file'])
def test_a_killed_writer_leaves_what_was_there(before, manifest, truth, tmp_path):
    folder = tmp_path/'cache'
    if before == 'a damaged file':
        path = built(manifest, folder).path
        data = path.read_bytes()[:-1] + b'?'
        path.write_bytes(data)
    (victim,), _ = start_writers(1, manifest.root, folder, .1)
    end = time.time() + 60
    while not (folder.is_dir() and list(folder.glob('.*.part'))) and time.time() < end: time.sleep(.01)
    time.sleep(.25)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(30)
    assert victim.exitcode == -signal.SIGKILL
    assert len(leftovers(folder)) == 1
    if before == 'nothing': assert list(folder.glob('*.pixels')) == []
    else: assert path.read_bytes() == data
    cache = built(manifest, folder)
    assert cache.computed == N and leftovers(folder) == []
    assert np.array_equal(cache.images(manifest.table.path), truth)


def fill_the_disk(raw, folder, answers):
    "Build where no file may grow beyond 8,000 bytes"
    manifest = build_manifest(raw, progress=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
    try: build_cache(manifest, PREPROCESS, folder, progress=False)
    except LoaderError as e: answers.put(str(e))


def test_a_full_disk_is_an_error_and_leaves_nothing(manifest, tmp_path):
    answers = FORK.Queue()
    child = FORK.Process(target=fill_the_disk, args=(manifest.root, tmp_path/'cache', answers), daemon=True)
    child.start()
    assert 'must have room and be writable' in answers.get(timeout=60)
    child.join(30)
    assert list((tmp_path/'cache').glob('*.pixels')) == [] and leftovers(tmp_path/'cache') == []
    assert built(manifest, tmp_path/'cache').computed == N


# ---- a thousand items, eight processes

MANY, SMALL = 1000, Preprocess(size=(8, 8))


@pytest.fixture(scope='module')
def thousand(tmp_path_factory):
    "A manifest of a thousand different small pictures, and what each item has to be"
    root, g = tmp_path_factory.mktemp('thousand'), np.random.default_rng(3)
    for i in range(MANY):
        (root/f'{"no" if i % 2 else "glioma"}').mkdir(exist_ok=True)
        Image.fromarray(g.integers(0, 256, (8, 8), dtype=np.uint8)).save(root/f'{"no" if i % 2 else "glioma"}'/f'{i:04d}.png')
    manifest = build_manifest(root, progress=False)
    return manifest, {row.path: loaders._prepare(root, row, SMALL) for row in manifest.table.itertuples()}


def wrong_items(cache, truth): return sum(not np.array_equal(cache.image(p), x) for p, x in truth.items())


def racer(manifest, truth, folder, answers, together):
    "Build and read everything, twice over, while others do the same and a vandal is about"
    together.wait()
    made = wrong = 0
    for _ in range(2):
        cache = build_cache(manifest, SMALL, folder, workers=1, progress=False)
        made, wrong = made + cache.computed, wrong + wrong_items(cache, truth)
    answers.put((made, wrong))


def vandalise(path, g, end):
    "Change bytes of a cache in place: in its header, its payload, its checksums; and exchange two entries"
    if not path.is_file(): return
    with open(path, 'r+b') as f:
        size = path.stat().st_size
        for at in (int(g.integers(0, 60)), int(g.integers(size - MANY*68, size)), *g.integers(4096, size, 8).tolist()):
            f.seek(at)
            f.write(bytes([int(g.integers(0, 256))]))
        a, b = (size - 4*MANY - 33 - 64*MANY + 64*int(k) for k in g.choice(MANY, 2, replace=False))
        f.seek(a)
        one = f.read(64)
        f.seek(b)
        other = f.read(64)
        f.seek(a)
        f.write(other)
        f.seek(b)
        f.write(one)


def test_eight_processes_over_a_thousand_items(thousand, tmp_path):
    "One racer is killed while it writes, the file is damaged under the others: 0 wrong items, and all is mended in the end"
    (manifest, truth), folder, g = thousand, tmp_path/'cache', np.random.default_rng(5)
    answers, together = FORK.Queue(), FORK.Barrier(8)
    racers = [FORK.Process(target=racer, args=(manifest, truth, folder, answers, together), daemon=True) for _ in range(8)]
    for p in racers: p.start()
    end, parts = time.time() + 60, []
    while not parts and time.time() < end: parts = list(folder.glob('.*.part')) if folder.is_dir() else []
    victim = int(parts[0].name.split('.')[-2].split('-')[0])
    os.kill(victim, signal.SIGKILL)
    assert victim in {p.pid for p in racers}, 'the one that held the lock'
    while sum(p.is_alive() for p in racers) > 1 and time.time() < end:
        for path in folder.glob('*.pixels'): vandalise(path, g, end)
        time.sleep(.2)
    got = [answers.get(timeout=60) for _ in range(7)]
    for p in racers: p.join(30)
    print(f'7 of 8 racers came through: {[w for _, w in got]} wrong of {2*MANY} each, {[m for m, _ in got]} items made')
    assert [w for _, w in got] == [0]*7 and sum(m for m, _ in got) >= MANY
    last = build_cache(manifest, SMALL, folder, progress=False)
    again = build_cache(manifest, SMALL, folder, progress=False)
    assert last.computed == last.damaged and (again.computed, again.damaged) == (0, 0)
    assert wrong_items(again, truth) == again.damaged == 0 and leftovers(folder) == []


def test_a_thousand_items_damaged_mended_and_counted(thousand, tmp_path):
    (manifest, truth), folder = thousand, tmp_path/'cache'
    cache = build_cache(manifest, SMALL, folder, progress=False)
    data, first = cache.path.read_bytes(), len(cache.layout.head)
    out, hit = bytearray(data), [3, 77, 500, 998, 999]
    for i in hit: out[first + 64*i + i % 64] ^= 1
    out[first + 64*10:first + 64*11], out[first + 64*20:first + 64*21] = data[first + 64*20:first + 64*21], data[first + 64*10:first + 64*11]
    cache.path.write_bytes(out)
    assert wrong_items(cache, truth) == 0 and cache.damaged == 7, 'an open reader hands out none and counts them'
    mended = build_cache(manifest, SMALL, folder, progress=False)
    assert (mended.computed, mended.damaged) == (7, 7) and mended.path.read_bytes() == data


@pytest.mark.parametrize('change', ['shortened', 'emptied', 'deleted', 'replaced'])
def test_a_file_that_shrinks_or_goes_under_a_reader(change, manifest, truth, tmp_path):
    "A mapping beyond the end of its file would kill the process; here the items are made anew, and it is counted"
    cache = built(manifest, tmp_path/'cache')
    cache.image(manifest.table.path[0])
    data = cache.path.read_bytes()
    if change == 'deleted': cache.path.unlink()
    else: os.truncate(cache.path, 5000 if change == 'shortened' else 0)
    if change == 'replaced':
        (tmp_path/'new').write_bytes(data)
        os.replace(tmp_path/'new', cache.path)
    assert np.array_equal(cache.images(manifest.table.path), truth)
    assert cache.damaged == (N if change in ('shortened', 'emptied') else 0)
    assert np.array_equal(pickle.loads(pickle.dumps(cache)).images(manifest.table.path), truth)


def as_nobody(folder, manifest, kind, answers):
    "Open the cache as a user who may only read, or on a disk without room"
    if kind == 'full disk': resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
    elif os.getuid() == 0: os.setuid(65534)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try:
            cache = build_cache(manifest, PREPROCESS, folder, progress=False)
            crc = zlib.crc32(cache.images(manifest.table.path))
            got = cache.computed, cache.damaged, crc, [str(w.message)[:15] for w in said]
        except LoaderError as e: got = str(e)
    answers.put(got)


@pytest.mark.parametrize('state', ['good', 'two damaged', 'no file'])
@pytest.mark.parametrize('kind', ['read-only', 'full disk'])
def test_where_nothing_can_be_written_everything_stays_readable(kind, state, truth, tmp_path):
    home = Path(tempfile.mkdtemp(prefix='phoenix-')) # pytest's own folder is closed to other users
    try:
        manifest, folder = build_manifest(write_pictures(home/'raw'), progress=False), home/'cache'
        folder.mkdir()
        if state != 'no file':
            path = built(manifest, folder).path
            data = bytearray(path.read_bytes())
            if state == 'two damaged': data[-900 - 24*32] ^= 1; data[-900] ^= 1
            path.write_bytes(data)
        for p in [home, *home.rglob('*')]: p.chmod(0o555 if p.is_dir() else 0o444)
        answers = FORK.Queue()
        child = FORK.Process(target=as_nobody, args=(folder, manifest, kind, answers), daemon=True)
        if kind == 'full disk':
            for p in [folder, *folder.iterdir()]: p.chmod(0o777)
        child.start()
        got = answers.get(timeout=60)
        child.join(30)
        if state == 'no file': assert 'must have room and be writable' in got
        elif state == 'good': assert got == (0, 0, zlib.crc32(truth), [])
        else: assert got == (0, 4, zlib.crc32(truth), ['2 damaged items']), 'two when opened, and again when read'
    finally:
        home.chmod(0o755)
        for p in home.rglob('*'): p.chmod(0o755)
        shutil.rmtree(home)
