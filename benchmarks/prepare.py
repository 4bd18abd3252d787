"""Tokens per second of `gptlab prepare` against tiktoken's `encode_ordinary_batch`.

The text is cut into documents and written to a jsonl file. tiktoken gets the documents in memory and returns lists of
ids; gptlab reads the file, tokenises it, and writes shards with sha256 and a manifest to disk. Both take turns, for
each number of threads, with the same documents and the same ids. CPU seconds are those of the whole process; on a busy
machine they are more reliable than wall time.

    python benchmarks/prepare.py                               # text: the standard library of this Python
    python benchmarks/prepare.py --text novels/ --megabytes 20 --threads 1 2 --rounds 5
    python benchmarks/prepare.py --memory                      # peak memory for 1, 3 and 10 times the documents
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common import in_turn, machine, ratios, say, show, spread, table, write_json

from gptlab.data.corpora import open_corpus
from gptlab.data.prepare import prepare
from gptlab.data.shards import Dataset
from gptlab.data.tokenizers import _gpt2_encoding
from gptlab.machine import cores

PEAK = """
import resource, sys
from gptlab.data.prepare import prepare
prepare(sys.argv[1], out=sys.argv[2], workers=int(sys.argv[3]), progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def documents(text: Path | None, characters: int, limit: int) -> Iterator[str]:
    """Pieces of a corpus of at most `characters` characters, `limit` characters in total."""
    for _, whole in open_corpus("text", text).documents() if text else open_corpus("stdlib").documents():
        for begin in range(0, len(whole), characters):
            if limit <= 0:
                return
            piece = whole[begin : begin + characters]
            limit -= len(piece)
            yield piece


def write_jsonl(path: Path, texts: list[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds, and CPU seconds of all threads."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def memory(texts: list[str], folder: Path, workers: int) -> dict[int, float]:
    """Peak memory in MiB of a process that prepares one, three or ten tenths of the documents."""
    peaks = {}
    for tenths in (1, 3, 10):
        write_jsonl(folder / f"{tenths}.jsonl", texts[: len(texts) * tenths // 10])
        command = [sys.executable, "-c", PEAK, folder / f"{tenths}.jsonl", folder / f"set{tenths}", str(workers)]
        peaks[tenths] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, metavar="PATH", help="file or folder (default: the standard library)")
    parser.add_argument("--megabytes", type=int, default=10, help="approximate size of the text (default: 10)")
    parser.add_argument("--document", type=int, default=5000, metavar="N", help="maximum characters of a document")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, cores()])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    before = machine()
    texts = list(documents(args.text, args.document, args.megabytes * 10**6))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.memory:
            peaks = memory(texts, folder, args.threads[-1])
            write_json(args.json, {"machine": before, "documents": len(texts), "peak MiB": peaks})
            table([("documents", "peak MiB"), *((len(texts) * n // 10, f"{mib:.0f}") for n, mib in peaks.items())])
            return

        write_jsonl(folder / "documents.jsonl", texts)
        encoding = _gpt2_encoding()
        tokens = sum(map(len, encoding.encode_ordinary_batch(texts))) + len(texts)  # also warms up
        threads = sorted(set(args.threads))
        numbers = itertools.count()

        def gptlab(workers: int) -> None:
            out = folder / f"set{next(numbers)}"
            prepare(str(folder / "documents.jsonl"), out=out, workers=workers, progress=False)
            splits = Dataset(out).manifest["splits"]
            assert splits["train"]["tokens"] + splits["val"]["tokens"] == tokens
            shutil.rmtree(out)

        gptlab(1)
        ways: dict[str, Callable[[], object]] = {}
        for n in threads:
            ways[f"tiktoken, {n} threads"] = lambda n=n: encoding.encode_ordinary_batch(texts, num_threads=n)
            ways[f"gptlab, {n} threads"] = lambda n=n: gptlab(n)
        clock: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for turn, name in enumerate(in_turn(list(ways), args.rounds)):
            for seconds, taken in zip((clock, cpu), timed(ways[name]), strict=True):
                seconds[name].append(taken)
            if (turn + 1) % len(ways) == 0:
                say(f"round {(turn + 1) // len(ways)}/{args.rounds}")

    pairs = [(f"tiktoken, {n} threads", f"gptlab, {n} threads") for n in threads]
    speed = {
        f"{n} threads": {"clock": ratios(clock[theirs], clock[ours]), "cpu": ratios(cpu[theirs], cpu[ours])}
        for n, (theirs, ours) in zip(threads, pairs, strict=True)
    }
    write_json(
        args.json,
        {
            "machine": before,
            "documents": len(texts),
            "tokens": tokens,
            "clock": clock,
            "cpu": cpu,
            "speed": speed,
        },
    )
    print(f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f}M characters, {tokens / 1e6:.2f}M tokens")
    table(
        [
            ("", "M tokens/s", "M tokens per CPU second"),
            *(
                (
                    name,
                    *(
                        show(spread([tokens / taken / 1e6 for taken in seconds[name]]), ".2f")
                        for seconds in (clock, cpu)
                    ),
                )
                for name in ways
            ),
            *((f"gptlab / tiktoken, {name}", show(both["clock"]), show(both["cpu"])) for name, both in speed.items()),
        ]
    )


if __name__ == "__main__":
    main()
