"Decode what it is given under limits of memory, processor and time, and say before each item which one it is"
import os
import pickle
import resource
import signal
import sys
from pathlib import Path

from phoenix.data.pixels import PixelError, pixels_sha256, read_pixels

GIB = 2 ** 30


class Abort:
    "An item that ends the process over which it comes, to prove that such an end is seen"
    def __fspath__(self): os.abort()


def outcome(source):
    "What became of one item, in one word and one detail"
    try: return f"pixels {pixels_sha256(read_pixels(source).grey)}"
    except PixelError as e: return f"refused {e.kind}"
    except BaseException as e: return f"untyped {type(e).__name__}"


def peak():
    "Largest memory of this process in MiB; getrusage would tell that of the process which started it"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) // 1024 for x in lines if x.startswith("VmHWM"))


def main(items, first, seconds):
    "Work through the pickled items from `first` on; an item that hangs is ended by the alarm's default action: death"
    import warnings
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (3 * GIB, 3 * GIB))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    for k, item in enumerate(pickle.loads(Path(items).read_bytes())):
        if k < int(first): continue
        print(f"start {k}", flush=True)
        signal.setitimer(signal.ITIMER_REAL, float(seconds))
        said = outcome(item)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"end {k} {said} {peak()}", flush=True)


if __name__ == "__main__": main(*sys.argv[1:])
