"""Token files: written bytes, read as numpy and llm.c's headers say, and every fault named."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from gptlab.data import shards
from gptlab.data.containers import read_shard, write_shard
from gptlab.data.prepare import prepare
from gptlab.data.sampler import Windows
from gptlab.data.shards import Dataset, Tokens
from gptlab.errors import DataError


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder of several shards a split."""
    source = tmp_path / "docs"
    source.mkdir()
    for index in range(40):
        (source / f"{index:02d}.txt").write_text(f"document {index} " * (index + 3), encoding="utf-8")
    return prepare(
        "text", source=source, out=tmp_path / "set", tokenizer="byte", shard_tokens=3000, workers=1, progress=False
    )


# -- containers


def test_llmc_bytes(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.array([50256, 0, 65535]), "llmc")
    expected = struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + struct.pack("<3H", 50256, 0, 65535)
    assert (tmp_path / "a.bin").read_bytes() == expected
    write_shard(tmp_path / "b.bin", np.array([128000, 1]), "llmc", np.uint32)
    expected = struct.pack("<256i", 20240801, 7, 2, *[0] * 253) + struct.pack("<2I", 128000, 1)
    assert (tmp_path / "b.bin").read_bytes() == expected


def test_other_peoples_readers_read_ours(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 50257, 1000)
    write_shard(tmp_path / "a.npy", tokens, "npy")
    assert np.array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), tokens)
    assert np.load(tmp_path / "a.npy").dtype == np.uint16
    write_shard(tmp_path / "train.bin", tokens, "nanogpt")
    assert np.array_equal(np.memmap(tmp_path / "train.bin", np.uint16, "r"), tokens)


@pytest.mark.parametrize(
    ("format", "dtype"), [("llmc", "u2"), ("llmc", "u4"), ("nanogpt", "u2"), ("npy", "u2"), ("npy", "u4")]
)
@pytest.mark.parametrize("count", [0, 1, 4097])
def test_written_shards_read_back(tmp_path: Path, format: str, dtype: str, count: int) -> None:
    tokens = np.random.default_rng(1).integers(0, 2 ** (8 * int(dtype[1])), count)
    write_shard(tmp_path / "train.x", tokens, format, dtype)
    shard = read_shard(tmp_path / "train.x")
    assert (shard.format, shard.tokens) == ((format, count) if count or format != "nanogpt" else ("nanogpt", 0))
    assert np.array_equal(shard.map()[0], tokens)


# -- one stream over many shards


@pytest.mark.parametrize("large", [0, 2**30])
def test_windows_cross_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    monkeypatch.setattr(shards, "RELEASE_EVERY", 5)
    monkeypatch.setattr(shards, "LARGE_SPLIT_BYTES", large)
    rng = np.random.default_rng(0)
    pieces = [rng.integers(0, 60000, size) for size in (7, 0, 1, 50, 2, 3, 0, 40)]
    for index, piece in enumerate(pieces):
        write_shard(tmp_path / f"{index}.bin", piece, ["llmc", "npy"][index % 2])
    tokens = Tokens([read_shard(tmp_path / f"{index}.bin") for index in range(len(pieces))])
    whole = np.concatenate(pieces)
    assert len(tokens) == len(whole) == 103
    for length in (1, 2, 20, 103):
        starts = rng.permutation(len(whole) - length + 1)
        expected = np.stack([whole[start : start + length] for start in starts])
        assert np.array_equal(tokens.gather(starts, length), expected)
    with pytest.raises(AssertionError):
        tokens.gather(np.array([102]), 2)


def resident() -> int:
    """Bytes of this process in memory, file pages included."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").open(encoding="utf-8")
        if line.startswith("VmRSS")
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("read_ahead", [False, True])
def test_resident_memory_does_not_grow_with_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_ahead: bool
) -> None:
    size = 20 * 10**9 if read_ahead else 2 * 10**8  # the second is read as a small split is, through the page cache
    monkeypatch.setattr(shards, "RELEASE_EVERY", 256)
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(size)  # sparse: it takes no room on disk
    write_shard(tmp_path / "val.bin", np.zeros(100), "nanogpt")
    dataset = Dataset(tmp_path)
    assert len(dataset.train) == size // 2
    rng = np.random.default_rng(0)
    dataset.train.gather(rng.integers(0, size // 2 - 1025, 64), 1025)
    before = resident()
    largest = 0
    for _ in range(64):
        dataset.train.gather(rng.integers(0, size // 2 - 1025, 64), 1025)
        largest = max(largest, resident() - before)
    # 4096 windows of one to two pages are 25 MiB, and all of the small file where the system maps 64 KiB a fault.
    assert largest < (10 if read_ahead else 40) * 2**20


# -- prepared folders


def test_a_prepared_folder(prepared: Path) -> None:
    dataset = Dataset(prepared)
    assert len(dataset.train.shards) > 2
    assert dataset.vocab_size == 257
    assert dataset.tokenizer.eot == 256
    assert len(dataset.train) == dataset.manifest["splits"]["train"]["tokens"]
    dataset.check(257)
    dataset.verify()
    with pytest.raises(DataError, match=r"token id 256, and a vocabulary of 256 ends at 255"):
        dataset.check(256)


def test_fingerprint_names_the_content(prepared: Path, tmp_path: Path) -> None:
    before = Dataset(prepared).fingerprint()
    shutil.copytree(prepared, tmp_path / "copy")
    assert Dataset(tmp_path / "copy").fingerprint() == before
    other = prepare("text", source=tmp_path / "docs", out=tmp_path / "o", tokenizer="char", workers=1, progress=False)
    assert Dataset(other).fingerprint() != before


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def patch(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


def shorten_header(path: Path) -> None:
    count = read_shard(path).tokens - 5
    cut(path, 10)
    patch(path, 8, struct.pack("<i", count))


FAULTS = {
    "missing": (lambda path: path.unlink(), "train-000001.bin is missing"),
    "truncated": (lambda path: cut(path, 2), "train-000001.bin is truncated: its header counts 3000 tokens"),
    "header": (lambda path: cut(path, path.stat().st_size - 100), "less than llm.c's header of 1024"),
    "empty": (lambda path: path.write_bytes(b""), "is truncated: 0 bytes"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"xx"), "is longer than it says"),
    "foreign": (lambda path: patch(path, 0, struct.pack("<i", 20240522)), "first number is 20240522 instead of"),
    "version": (lambda path: patch(path, 4, struct.pack("<i", 2)), "has version 2 of llm.c's format"),
    "count": (shorten_header, "it holds 2995 tokens, the manifest 3000"),
    "npy": (lambda path: write_shard(path, np.zeros(9), "npy"), "is (truncated|not a token shard)"),
    "wide": (lambda path: write_shard(path, np.zeros(3000), "llmc", np.uint32), "it holds uint32, not uint16"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_shard_is_named_on_opening(prepared: Path, fault: str) -> None:
    damage, sentence = FAULTS[fault]
    damage(prepared / "train-000001.bin")
    with pytest.raises(DataError, match=sentence):
        Dataset(prepared)


def test_a_changed_shard_is_found_by_verify(prepared: Path) -> None:
    patch(prepared / "val-000000.bin", 1100, b"\x01")
    with pytest.raises(DataError, match=r"val-000000.bin is damaged: its sha256"):
        Dataset(prepared).verify()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda manifest: manifest.pop("splits"), "damaged: KeyError"),
        (lambda manifest: manifest.update(version=99), "version 99"),
        (lambda manifest: manifest["splits"]["train"]["shards"][0].update(file="../x.bin"), "outside its folder"),
        (lambda manifest: manifest.update(format="tar"), "format tar"),
    ],
)
def test_a_manifest_we_cannot_trust_is_refused(prepared: Path, change: object, sentence: str) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)  # type: ignore[operator]
    (prepared / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DataError, match=sentence):
        Dataset(prepared)


def test_folders_without_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at .*nowhere: make one with `gptlab prepare CORPUS --out .*nowhere`"):
        Dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no train shard .* and no val shard"):
        Dataset(tmp_path)
    write_shard(tmp_path / "train.bin", np.zeros(5), "nanogpt")
    with pytest.raises(DataError, match=r"no manifest.json and no val shard"):
        Dataset(tmp_path)
    (tmp_path / "progress.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="not finished: run the same `gptlab prepare` again"):
        Dataset(tmp_path)


# -- other people's folders


def test_nanogpt_folder(tmp_path: Path) -> None:
    train, val = np.array([50256, 1, 2, 3] * 50), np.array([4, 5, 50256])
    write_shard(tmp_path / "train.bin", train, "nanogpt")
    write_shard(tmp_path / "val.bin", val, "nanogpt")
    dataset = Dataset(tmp_path)
    assert np.array_equal(dataset.train.gather(np.array([0]), 200)[0], train)
    assert np.array_equal(dataset.val.gather(np.array([0]), 3)[0], val)
    assert dataset.vocab_size == 0
    assert dataset.tokenizer.name == "gpt2"
    dataset.check(50257)
    with pytest.raises(DataError, match=r"holds token id 50256, and a vocabulary of 50256 ends at 50255"):
        dataset.check(50256)
    with pytest.raises(DataError, match="no sha256"):
        dataset.verify()
    before = dataset.fingerprint()
    patch(tmp_path / "train.bin", 2, b"\x09")
    assert Dataset(tmp_path).fingerprint() != before
    cut(tmp_path / "val.bin", 1)
    with pytest.raises(DataError, match=r"val.bin is truncated: 5 bytes"):
        Dataset(tmp_path)


def test_a_scan_finds_the_largest_id_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SCAN_TOKENS", 10)
    ids = np.zeros(95, np.int64)
    ids[57] = 60000
    write_shard(tmp_path / "train.bin", ids, "nanogpt")
    write_shard(tmp_path / "val.bin", ids[:5], "nanogpt")
    assert Dataset(tmp_path).max_token() == (60000, tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"id 60000 in train.bin is none of GPT-2's"):
        _ = Dataset(tmp_path).tokenizer


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_nanogpt_characters_without_unpickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    characters = "\n !az\u00e9\U0001f600"
    meta = {"vocab_size": 7, "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}.bin", np.array([3, 4, 0]), "nanogpt")
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "load", None)
    dataset = Dataset(tmp_path)
    assert dataset.vocab_size == 7
    assert dataset.tokenizer.decode(dataset.tokenizer.encode("a\u00e9")) == "a\u00e9"
    assert dataset.tokenizer.encode("az") == [3, 4]
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": print}, protocol))
    with pytest.raises(DataError, match="not the character vocabulary"):
        Dataset(tmp_path)


def test_build_nanogpt_and_llmc_folders(tmp_path: Path) -> None:
    for folder, suffix, format in (("npy", "npy", "npy"), ("llmc", "bin", "llmc")):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / f"edufineweb_val_000000.{suffix}", np.arange(10), format)
        write_shard(tmp_path / folder / f"edufineweb_train_000002.{suffix}", np.arange(200, 300), format)
        write_shard(tmp_path / folder / f"edufineweb_train_000001.{suffix}", np.arange(100, 200), format)
        dataset = Dataset(tmp_path / folder)
        assert np.array_equal(dataset.train.gather(np.array([0]), 200)[0], np.arange(100, 300))
        assert len(dataset.val) == 10
        assert dataset.manifest["format"] == format
    np.save(tmp_path / "npy" / "edufineweb_train_000003.npy", np.zeros(4, np.float32))
    with pytest.raises(DataError, match="holds float32 of shape"):
        Dataset(tmp_path / "npy")


def words(count: int, largest: int, seed: int = 0) -> np.ndarray:
    """Ids as frequent as words are."""
    return (np.random.default_rng(seed).random(count) ** 4 * largest).astype(np.int64)


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4"])
@pytest.mark.parametrize("largest", [50257, 151_936])
@pytest.mark.parametrize(("count", "few"), [(1000, 5), (300_001, 90)])
def test_the_width_of_ids_is_told_from_the_content(
    tmp_path: Path, dtype: str, largest: int, count: int, few: int
) -> None:
    if dtype == "<u2":
        largest = min(largest, 2**16)
    train, val = words(count, largest), words(few, largest, 1)  # too few to tell: as wide as the others
    train.astype(dtype).tofile(tmp_path / "train.bin")
    val.astype(dtype).tofile(tmp_path / "val.bin")
    dataset = Dataset(tmp_path)
    assert np.array_equal(dataset.train.gather(np.array([0]), count)[0], train)
    assert np.array_equal(dataset.val.gather(np.array([0]), few)[0], val)
    assert dataset.manifest["dtype"] == ("uint16" if dtype == "<u2" else "uint32")
    assert dataset.max_token()[0] == max(train.max(), val.max())


def test_a_small_vocabulary_of_16_bits_is_no_pair_of_halves(tmp_path: Path) -> None:
    for ids in (words(4000, 65), words(4000, 4), np.zeros(4000), np.full(4000, 3), np.arange(4000), words(64, 16)):
        ids.astype("<u2").tofile(tmp_path / "x.bin")
        assert read_shard(tmp_path / "x.bin").dtype == np.dtype("<u2")


def test_what_the_content_does_not_tell_is_asked(tmp_path: Path) -> None:
    ids = words(4000, 65)
    ids[1::2] = 0  # 16-bit ids with a zero after each, or 32-bit ids
    for split in ("train", "val"):
        ids.astype("<u2").tofile(tmp_path / f"{split}.bin")
    with pytest.raises(DataError, match=r"say it in the name, train\.uint16\.bin or train\.uint32\.bin"):
        Dataset(tmp_path)
    for word, expected in (("uint16", ids), ("uint32", ids[::2]), ("int32", ids[::2])):
        for file in tmp_path.glob("*.bin"):
            file.rename(tmp_path / f"{file.name.split('.')[0]}.{word}.bin")
        dataset = Dataset(tmp_path)
        assert np.array_equal(dataset.train.gather(np.array([0]), len(expected))[0], expected)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (words(900, 50257).astype("<i8").tobytes(), "holds 64-bit numbers: .*uint16 without a header"),
        (b"It was the best of times,\n" * 99, "holds text or 8-bit numbers.*gptlab prepare"),
        (b"LITPKDS" + bytes(17) + words(900, 32000).astype("<u2").tobytes(), "LitGPT's or TinyLlama's packed shards"),
        (b"MMIDIDX\0\0" + bytes(99), "Megatron-LM's or fairseq's indexed shards"),
        (struct.pack("<256i", 20240522, 1, 3, *[0] * 253) + bytes(999), r"header of llm.c \(20240522\).*move it out"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*`git lfs pull`"),
        (words(901, 50257).astype("<u2").tobytes() + b"x", "is truncated"),
    ],
)
def test_a_file_that_holds_no_ids_is_refused_by_name(tmp_path: Path, content: bytes, sentence: str) -> None:
    words(900, 50257).astype("<u2").tofile(tmp_path / "fineweb_train_000001.bin")
    (tmp_path / "hellaswag_val.bin").write_bytes(content)
    with pytest.raises(DataError, match=f"hellaswag_val.bin.* {sentence}"):
        Dataset(tmp_path)


@pytest.mark.parametrize(
    ("files", "whose"),
    [
        ({"train_text_document.bin": "", "train_text_document.idx": "MMIDIDX"}, "Megatron-LM's or fairseq's"),
        ({"my_text_document.bin": "", "my_text_document.idx": "MMIDIDX"}, "Megatron-LM's or fairseq's"),
        ({"train/index.json": '{"version": 2, "shards": []}', "train/shard.00000.mds": ""}, "MosaicML's streaming"),
        ({"val/shard.00000.mds": ""}, "MosaicML's streaming"),
        ({"index.json": '{"chunks": [], "config": {}}', "chunk-0-0.bin": ""}, "LitData's"),
        ({"train/slim_0000000000.bin": "LITPKDS"}, "LitGPT's or TinyLlama's"),
        ({"00000_unshuffled.ds": "", "00000_unshuffled.ds.index": ""}, "datatrove's"),
        ({"train-000000.tar": "", "train-000001.tar": ""}, "WebDataset's"),
        ({"data-00000-of-00001.arrow": "", "state.json": "{}"}, "Hugging Face datasets"),
        ({"input.txt": "words"}, "text"),
    ],
)
def test_folders_of_other_packers_are_refused_by_name(tmp_path: Path, files: dict[str, str], whose: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"{whose}.*which gptlab does not read.*`gptlab prepare PATH`"):
        Dataset(tmp_path)


def test_a_file_belongs_to_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("training_0", "train1", "valid", "x_dev_0", "test", "testing_1", "other"):
        write_shard(tmp_path / f"{name}.bin", np.arange(5), "nanogpt")
    dataset = Dataset(tmp_path)
    assert [shard.path.stem for shard in dataset.train.shards] == ["train1", "training_0"]
    assert [shard.path.stem for shard in dataset.val.shards] == ["valid", "x_dev_0"]
    assert capsys.readouterr().err == f"{tmp_path}: left out, for no word for train or val in the name: other.bin\n"
    for name in ("train_val", "train-test", "validation.eval.train"):
        write_shard(tmp_path / f"{name}.bin", np.arange(5), "nanogpt")
        with pytest.raises(DataError, match=rf"{name}.bin says both train and (val|test) in its name"):
            Dataset(tmp_path)
        (tmp_path / f"{name}.bin").unlink()


def test_a_split_that_is_too_short_is_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}.bin", np.arange(30), "nanogpt")
    dataset = Dataset(tmp_path)
    for split, tokens in (("train", dataset.train), ("val", dataset.val)):
        with pytest.raises(DataError, match=f"^{tmp_path}: the {split} split has 30 tokens, less than one window"):
            Windows(tokens, 64, "sequential", 0)


def test_files_of_two_widths_are_not_mixed(tmp_path: Path) -> None:
    words(900, 50257).astype("<u2").tofile(tmp_path / "train.bin")
    words(700, 50257).astype("<u4").tofile(tmp_path / "val.bin")
    with pytest.raises(DataError, match=r"train.bin holds uint16 ids, and .*val.bin uint32"):
        Dataset(tmp_path)


def test_without_a_look_the_manifest_is_taken_at_its_word(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("to be or not to be " * 200, encoding="utf-8")
    for form in ("llmc", "nanogpt", "npy"):
        folder = prepare("text", source=tmp_path / "in.txt", out=tmp_path / form, tokenizer="byte", format=form)
        looked, trusted = Dataset(folder), Dataset(folder, look=False)
        assert trusted.shards == looked.shards
        np.testing.assert_array_equal(
            trusted.train.gather(np.array([0, 5]), 9), looked.train.gather(np.array([0, 5]), 9)
        )
        looked.shards[0].path.unlink()
        with pytest.raises(DataError, match="is missing"):
            Dataset(folder)
        assert len(Dataset(folder, look=False).train)
