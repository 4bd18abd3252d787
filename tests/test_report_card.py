"""card.md states what the run's files state, and nothing else."""

import itertools
import json
import re

import pytest

from gptlab.config import build_recipe, settings
from gptlab.errors import RunError
from gptlab.report.card import GROUPS, SETTING_NAMES, card, escape, show, write_card
from gptlab.rundir import RunDir

RESULT = {
    "status": "completed",
    "steps": 300,
    "tokens": 3_000_000,
    "final_train_loss": 3.0123,
    "final_val_loss": 3.2,
    "val_perplexity": 24.5325,
    "tokens_per_second": 260123.4,
    "peak_memory_gb": 34.51,
    "wall_seconds": 36184.2,
}
ENVIRONMENT = {
    "gptlab": "0.1",
    "python": "3.11.7",
    "torch": "2.9.1",
    "device": "cuda",
    "device_name": "Some GPU",
    "cpu_count": 16,
    "git_commit": "abc123",
    "command": ["gptlab", "train", "my recipe"],
    "parameters": 124439808,
    "data": {"path": "data/x", "corpus": "stdlib", "tokenizer": "gpt2", "train_tokens": 1_500_000, "val_tokens": 1000},
}


def make_run(path, result=RESULT, environment=ENVIRONMENT, evaluations=(6.0, 3.1, 3.2), **settings) -> RunDir:
    run = RunDir(path)
    layer = {key.replace("__", "."): value for key, value in settings.items()}
    run.write_recipe(build_recipe({"name": "tiny", "train.max_steps": 300}, layer))
    if result:
        run.write_json("result.json", result)
    if environment:
        run.write_json("environment.json", environment)
    with run.open_metrics() as file:
        for index, loss in enumerate(evaluations):
            line = {"step": index * 10, "tokens": index * 1000, "val_loss": loss}
            file.write(json.dumps(line | {"val_bits_per_byte": loss and loss / 4}) + "\n")
    return run


def cells(text, section):
    """The rows of a section's first table, as lists of cells, without its header."""
    body = text.split(f"## {section}\n", 1)[1].split("\n## ")[0]
    table = re.search(r"(?:^\|.*\n?)+", body, re.MULTILINE).group()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table.strip().splitlines()[2:]]


def told(text):
    """The settings' table as {name in words: value}."""
    return {row[1]: row[2] for row in cells(text, "Settings")}


def test_the_facts_are_those_of_the_files(tmp_path):
    run = make_run(tmp_path / "tiny_seed7", seed=7, optim__lr=0.002, model__norm="rmsnorm")
    assert write_card(run) == run.path / "card.md"
    text = (run.path / "card.md").read_text(encoding="utf-8")
    assert text == card(run)
    assert text.startswith("# Run tiny\\_seed7\n") and "seed 7." in text
    assert "**completed** after 300 steps and 3M tokens." in text
    names = {row[3]: row[1:3] for row in cells(text, "Settings")}
    assert names["`model.norm`"] == ["norm", "RMSNorm"] and "`model.qk_norm`" not in names
    assert names["`model.n_head`"] == ["attention heads", "12 of width 64"]
    assert names["`optim.lr`"] == ["learning rate", "0.002"] and names["`train.max_steps`"] == ["steps at most", "300"]
    assert names["`optim.betas`"] == ["betas", "0.9, 0.95"] and "`train.deterministic`" not in names
    facts = told(text)
    assert facts["parameters"] == "124,439,808 (124M)" and facts["tokenizer"] == "gpt2"
    assert facts["train tokens"] == "1,500,000 (1.5M)" and facts["passes over the training split"] == "2"
    assert dict(cells(text, "Provenance"))["PyTorch"] == "2.9.1"
    results = dict(cells(text, "Results"))
    assert results["final validation loss (nats per token)"] == "3.2000"
    assert results["best validation loss"] == "3.1000 at step 10"
    assert results["validation bits per byte"] == "0.8000"  # of the last evaluation
    assert results["wall time"] == "10 h 3 min" and results["tokens per second"] == "260,123"
    assert f"gptlab train {run.path}/recipe.toml --out {run.path}-again" in text
    assert "gptlab train 'my recipe'" in text


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        ("result", "final_val_loss", 2.5, "2.5000"),
        ("result", "status", "interrupted", "**interrupted**"),
        ("result", "micro_f1", 0.8125, "| micro-F1 | 0.8125 |"),
        ("result", "val_perplexity", None, "| validation perplexity | not finite |"),
        ("environment", "torch", "9.9", "9.9"),
        ("environment", "float8", "emulated in float32", "| float8 | emulated in float32 |"),
        ("environment", "parameters", 77_000, "77,000 (77K)"),
        (
            "environment",
            "optimizer",
            {"kernel": "fused", "eps": None, "bytes_per_parameter": 8.0},
            "| optimizer | kernel fused, bytes per parameter 8 |",
        ),
    ],
)
def test_an_altered_input_alters_the_card(tmp_path, name, key, value, says):
    files = {"result": RESULT, "environment": ENVIRONMENT}
    before = card(make_run(tmp_path / "a"))
    after = card(make_run(tmp_path / "b", **{name: files[name] | {key: value}}))
    assert says in after and says not in before


def test_a_diverged_run_says_where_and_why(tmp_path):
    result = {"status": "diverged", "steps": 41, "failed_at_step": 42, "reason": "loss is\nnot *finite*"}
    text = card(make_run(tmp_path / "a", result=result, evaluations=(6.0, None)))
    assert r"**diverged** at step 42 after 41 steps: loss is not \*finite\*." in text
    assert cells(text, "Evaluations")[1][2] == "not finite"


def test_curve_sample_and_results_come_first_and_provenance_last(tmp_path):
    run = make_run(tmp_path / "a", sample__prompt="def ")
    assert "![" not in card(run) and "## Sample" not in card(run)
    run.plots.mkdir()
    (run.plots / "train-val_loss.png").write_bytes(b"")
    (run.path / "samples").mkdir()
    for step in (100, 300):
        (run.path / f"samples/step-{step:08d}.txt").write_text(f"def f{step}():\n    return '```'\x1b\n", "utf-8")
    text = card(run)
    assert "after step 300, which goes on from \"def \":\n\n````\ndef f300():\n    return '```'\\x1b\n````" in text
    other = make_run(tmp_path / "b", sample__prompt="def f():\n    ")
    (other.path / "samples").mkdir()
    (other.path / "samples/step-00000300.txt").write_text("def f():\n    pass\n", "utf-8")
    assert "## Sample\n\nText of the model after step 300:\n\n```\ndef f" in card(other)
    order = ["Status:", "![Losses of the run](plots/train-val_loss.png)"]
    order += [f"## {name}" for name in ("Sample", "Results", "Evaluations", "Settings", "Provenance")]
    assert sorted(order, key=text.index) == order
    (run.path / "samples/step-00000300.txt").write_text("a" * 5000, "utf-8")
    assert f"\n{'a' * 1200}…\n" in card(run)


def test_settings_stand_in_groups_and_every_section_has_a_title(tmp_path):
    assert {key.partition(".")[0] for key, _ in settings() if "." in key} == set(GROUPS)
    assert set(SETTING_NAMES) <= {key for key, _ in settings()}
    rows = cells(card(make_run(tmp_path / "a", schedule__warmup_steps=7, model__bias=False)), "Settings")
    groups = [row[0].strip("*") for row in rows if row[0]]
    assert groups == [title for title in GROUPS.values() if title in groups]  # each once, in order
    (warmup,) = [i for i, row in enumerate(rows) if row[3] == "`schedule.warmup_steps`"]
    assert [row[0] for row in rows[: warmup + 1] if row[0]][-1] == "**Learning rate schedule**"
    assert {row[3]: row[2] for row in rows}["`model.bias`"] == "no"


def test_what_is_absent_is_left_out(tmp_path):
    text = card(make_run(tmp_path / "a", result=None, environment=None, evaluations=()))
    assert "no result yet" in text
    for missing in (
        "## Results",
        "## Sample",
        "PyTorch",
        "## Evaluations",
        "parameters",
        "command was",
        "None",
        "not finite",
        "| nan",
        "Differ",
    ):
        assert missing not in text, missing


def test_evaluations_are_thinned_but_keep_the_ends_and_the_best(tmp_path):
    losses = [6.0 - 0.01 * i for i in range(101)]
    losses[53] = 1.0
    text = card(make_run(tmp_path / "a", evaluations=losses))
    rows = cells(text, "Evaluations")
    assert len(rows) == 12 and "12 of 101 evaluations." in text
    assert rows[0][0] == "0" and rows[-1][0] == "1,000"
    (best,) = [row for row in rows if "(best)" in row[0]]
    assert best == ["530 (best)", "53K", "1.0000", "0.2500"]
    steps = [int(row[0].removesuffix(" (best)").replace(",", "")) for row in rows]
    assert max(later - step for step, later in itertools.pairwise(steps)) < 150  # no hole where a row made room
    few = card(make_run(tmp_path / "b", evaluations=losses[:12]))
    assert [row[2] for row in cells(few, "Evaluations")] == [f"{loss:.4f}" for loss in losses[:12]]


def test_hellaswag_stands_in_the_row_of_its_step(tmp_path):
    run = make_run(tmp_path / "a")
    with run.open_metrics() as file:
        file.write('{"step": 10, "hellaswag_acc": 0.2612, "hellaswag_acc_norm": 0.2703}\n')
    rows = cells(card(run), "Evaluations")
    assert rows[1][-2:] == ["0.2612", "0.2703"] and rows[0][-2:] == ["", ""]


def test_differences_have_dotted_keys_and_both_values(tmp_path):
    earlier = make_run(tmp_path / "old", optim__lr=0.001, model__mlp="gelu", name="other")
    run = make_run(tmp_path / "new", RESULT | {"final_val_loss": 3.0}, optim__lr=0.002, model__mlp="swiglu")
    text = card(run, earlier)
    assert cells(text, "Differences from old") == [
        ["`model.mlp`", "gelu", "swiglu"],
        ["`optim.lr`", "0.001", "0.002"],
    ]
    assert "| final validation loss (nats per token) | 3.2000 | 3.0000 | -0.2000 |" in text
    assert "No setting differs." in card(run, run)


def test_markdown_in_texts_is_shown_and_not_obeyed(tmp_path):
    run = make_run(tmp_path / "a", sample__prompt="a | *b* <i>\n# `c`", description="[x](y) & | z")
    text = card(run)
    assert told(text)["prompt"] == r'"a \| \*b\* \<i\>\\n\# \`c\`"'
    assert r"\[x\](y) \& \| z" in text
    assert escape("a\n\tb") == "a b" and show(" x") == '" x"' and show("") == '""' and show(True) == "true"


def test_a_command_cannot_close_its_fence(tmp_path):
    text = card(make_run(tmp_path / "a", environment={"command": "echo ```\n# not a title"}))
    assert "````\necho ```\n# not a title\n````" in text


def test_a_damaged_result_is_one_sentence(tmp_path):
    run = make_run(tmp_path / "a")
    (run.path / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match=r"result\.json is damaged"):
        write_card(run)


def test_a_fineweb_edu_run_stands_beside_the_known(tmp_path):
    edu = {**ENVIRONMENT, "data": {**ENVIRONMENT["data"], "corpus": "fineweb-edu"}}
    run = make_run(tmp_path / "run", environment=edu, data__corpus="fineweb-edu", evaluations=())
    with run.open_metrics() as file:
        for step, loss, acc in ((0, 10.9, 0.25), (250, 3.0712, 0.3061)):
            file.write(json.dumps({"step": step, "val_loss": loss}) + "\n")
            file.write(json.dumps({"step": step, "hellaswag_acc_norm": acc, "hellaswag_acc": 0.2912}) + "\n")
    rows = cells(card(run), "Published results")
    assert rows[0] == ["**this run**", "FineWeb-Edu, 3M tokens", "3.071", "0.3061", "0.2912", "10 h 3 min"]
    assert rows[1][:5] == ["GPT-2 124M as released", "WebText", "3.292", "0.2955", "0.2859"]
    assert [row[2] for row in rows[2:]] == ["3.08", "3.26", "2.99"]  # none of FineWeb's: another quantity
    for chosen in ({"data__tokenizer": "byte"}, {"task": "classify", "model__mlp": "gelu_erf"}):
        other = make_run(tmp_path / str(len(chosen)), environment=edu, data__corpus="fineweb-edu", **chosen)
        assert "Published results" not in card(other)
    novels = make_run(tmp_path / "novels", data__corpus="fineweb-edu")  # by its manifest trained on other text
    assert "Published results" not in card(novels)
    nothing = make_run(tmp_path / "none", environment=edu, data__corpus="fineweb-edu", evaluations=())
    assert "Published results" not in card(nothing)
