"""Reads what `probe_trace trace FILE ...` wrote: when the phases of a launch begin and end, and how fast it streams."""

import sys

import numpy as np

EVENTS = (
    "start",
    "planned",
    "dispatched",
    "unit landed",
    "unit multiplied",
    "unit finished",
    "combine ready",
    "combined",
    "gate/up issued",
    "down issued",
    "tokens ready",
    "counted",
    "placed",
    "stored",
)


def show(head: np.ndarray, words: np.ndarray) -> None:
    """Prints one traced launch."""
    h, i, e, k, tokens = (int(v) for v in head[:5])
    print(f"\nH {h} I {i} E {e} k {k} T {tokens}")
    words = words[(words != 0).any(axis=(1, 2))]  # there is room for more CTAs than most launches have
    time = (words >> np.uint64(8)).astype(np.float64) / 1000
    event = (words & np.uint64(255)).astype(int)
    used = words != 0
    origin = time[used & (event == 0)].min()
    time = np.where(used, time - origin, np.nan)
    named = {name: used & (event == number) for number, name in enumerate(EVENTS)}
    for name in EVENTS:
        # The first and the last of each CTA.
        where = np.where(named[name], time, np.nan)
        if not named[name].any():
            continue
        first, last = np.nanmin(where, axis=(1, 2)), np.nanmax(where, axis=(1, 2))
        print(
            f"{name:>16}: first {np.nanmin(first):6.1f} {np.nanmedian(first):6.1f} {np.nanmax(first):6.1f}   "
            f"last {np.nanmin(last):6.1f} {np.nanmedian(last):6.1f} {np.nanmax(last):6.1f}   "
            f"{named[name].sum() / len(words):5.1f} a CTA"
        )
    end = np.nanmax(time)
    edges = np.linspace(0, end, 21)
    issued = np.zeros(20)
    bytes_of = {"gate/up issued": 128 * h, "down issued": 128 * i}
    for cta in range(len(words)):
        mine = [(t, bytes_of[n]) for n in bytes_of for t in time[cta][named[n][cta]]]
        mine.sort()
        stop = np.nanmax(time[cta][named["combine ready"][cta]])
        for (t, size), (after, _) in zip(mine, [*mine[1:], (stop, 0)], strict=True):
            overlap = np.clip(np.minimum(edges[1:], after) - np.maximum(edges[:-1], t), 0, None)
            issued += size * overlap / max(after - t, 1e-3)
    rates = issued / np.diff(edges) / 1e3
    print("GB/s issued, by twentieths: " + " ".join(f"{rate:.0f}" for rate in rates) + f"   ({edges[1]:.1f} us each)")
    # How long consumers wait for the next unit to land, and how long they take for one.
    for what, begin, stop_name in (("wait", "unit finished", "unit landed"), ("work", "unit landed", "unit finished")):
        spans = []
        for cta in range(len(words)):
            b, s = np.sort(time[cta][named[begin][cta]]), np.sort(time[cta][named[stop_name][cta]])
            if what == "wait":
                s = s[1:]
            spans += list(s[: len(b)] - b[: len(s)])
        quantiles = np.quantile(spans, [0.1, 0.5, 0.9, 1.0]) if spans else []
        text = " ".join(f"{q:.2f}" for q in quantiles)
        print(f"{what:>16}: {text} us (10 %, 50 %, 90 %, most); {sum(spans) / len(words):.1f} us a CTA")


def main() -> None:
    """Shows every launch of a file."""
    data = np.fromfile(sys.argv[1], np.uint64)
    while len(data):
        head, data = data[:8], data[8:]
        shape = [int(v) for v in head[5:8]]
        count = int(np.prod(shape))
        show(head, data[:count].reshape(shape))
        data = data[count:]


if __name__ == "__main__":
    main()
