"""Text logs, as the trainers that are known by name write them."""

import gzip
import math
import os
from pathlib import Path

import pytest

from gptlab.errors import UserError
from gptlab.logs import text
from gptlab.logs.read import read_logs
from gptlab.logs.run import How

NANOGPT = """Overriding config with config/train_shakespeare_char.py:
tokens per iteration will be: 16,384
number of parameters: 10.65M
step 0: train loss 4.2874, val loss 4.2823
iter 0: loss 4.2644, time 31293.90ms, mfu -100.00%
iter 10: loss 3.1462, time 26.51ms, mfu 14.05%
saving checkpoint to out-shakespeare-char
12:00:01 step 250: train loss 1.9653, val loss 2.0587
iter 250: loss 2.0312, time 4100.00ms, mfu 12.66%
"""
BUILD_NANOGPT = """0 val 10.9516
0 hella 0.2463
0 train 10.955029
1 train 10.602
250 val 5.9105
250 hella 0.2557
"""
LLM_C = """s:0 tel:11.0151
s:0 trl:11.0120 lr:0.000001 norm:15.39
s:1 trl:10.9654 lr:0.000002 norm:14.82
s:250 eval:0.2486
s:250 tel:6.0123
"""
LLM_C_OUT = """| train_num_batches     | 19560                                              |
val loss 11.009463
step    1/19560 | loss 11.012016 (+nanz)| norm 15.3937 (+nanz)| lr 8.57e-07 | 6060.63 ms | -100% bf16 MFU | 86507 tok/s
step    2/19560 | loss 10.965395 (+nanz)| norm 14.8213 (+nanz)| lr 1.71e-06 | 4093.39 ms | 49.1% bf16 MFU | 128081 tok/s
HellaSwag: 2500/10042 = 0.248954
val loss 10.5
"""
MODDED = """import os
    print0(f"step:{step}/{train_steps} val_loss:{val_loss:.4f} train_time:{training_time_ms:.0f}ms")
step:0/1750 val_loss:10.8258 train_time:0ms step_avg:0.05ms
step:1/1750 train_time:234ms step_avg:234.03ms
step:125/1750 val_loss:4.6021 train_time:11823ms step_avg:94.58ms
step:126/1750 train_loss:4.5 train_time:11900ms step_avg:94.44ms
"""
WRITTEN = {
    "nanogpt": (
        NANOGPT,
        {
            "val_loss": [(0, 4.2823), (250, 2.0587)],
            "train_loss": [(0, 4.2874), (250, 1.9653)],
            "loss": [(0, 4.2644), (10, 3.1462), (250, 2.0312)],
            "time_ms": [(0, 31293.90), (10, 26.51), (250, 4100)],
            "mfu": [(0, -100), (10, 14.05), (250, 12.66)],
        },
    ),
    "build-nanogpt": (
        BUILD_NANOGPT,
        {
            "val_loss": [(0, 10.9516), (250, 5.9105)],
            "train_loss": [(0, 10.955029), (1, 10.602)],
            "hellaswag": [(0, 0.2463), (250, 0.2557)],
        },
    ),
    "llm.c": (
        LLM_C,
        {
            "val_loss": [(0, 11.0151), (250, 6.0123)],
            "train_loss": [(0, 11.0120), (1, 10.9654)],
            "lr": [(0, 1e-6), (1, 2e-6)],
            "norm": [(0, 15.39), (1, 14.82)],
            "hellaswag": [(250, 0.2486)],
        },
    ),
    "llm.c, its output": (
        LLM_C_OUT,
        {
            "val_loss": [(0, 11.009463), (2, 10.5)],
            "train_loss": [(1, 11.012016), (2, 10.965395)],
            "norm": [(1, 15.3937), (2, 14.8213)],
            "lr": [(1, 8.57e-07), (2, 1.71e-06)],
            "hellaswag": [(2, 0.248954)],
        },
    ),
    "modded-nanogpt": (
        MODDED,
        {
            "val_loss": [(0, 10.8258), (125, 4.6021)],
            "train_loss": [(126, 4.5)],
            "train_time_ms": [(0, 0), (1, 234), (125, 11823), (126, 11900)],
            "step_avg_ms": [(0, 0.05), (1, 234.03), (125, 94.58), (126, 94.44)],
        },
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("said", [True, False], ids=["said", "guessed"])
def test_the_numbers_of_a_known_trainer_are_read_back(tmp_path: Path, name: str, said: bool) -> None:
    log, expected = WRITTEN[name]
    (tmp_path / "muon_seed2.log").write_text(log)
    logs = read_logs([tmp_path], How(pattern=name.partition(",")[0] if said else ""))
    (run,) = logs.runs
    curves = {k: [*zip(x.tolist(), y.tolist(), strict=True)] for k, (x, y) in run.curves.items()}
    assert curves == expected and (run.arm, run.seed, run.form) == ("muon", 2, "text")
    assert logs.metric == "val_loss"
    assert (f"text logs are read by --pattern {name.partition(',')[0]}" in logs.remarks) != said


def test_a_pattern_of_ones_own(tmp_path: Path) -> None:
    lines = ["[12:00] Step 1,000 | dev ppl=31.5 | acc 0.25", "other", "[12:01] Step 2,000 | dev ppl=nan | acc 0.5"]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\r\n".join(lines).encode()))
    logs = read_logs(
        [tmp_path], How(pattern=r"Step (?P<step>[\d,]+) \| dev ppl=(?P<ppl>\S+)(?: \| acc (?P<acc>\S+))?", metric="ppl")
    )
    (run,) = logs.runs
    assert run.curves["ppl"][0].tolist() == [1000, 2000] and run.curves["acc"][1].tolist() == [0.25, 0.5]
    assert run.curves["ppl"][1][0] == 31.5 and math.isnan(run.curves["ppl"][1][1])


def test_groups_of_arm_and_seed_make_several_runs_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "all.log").write_text("a/0 5 3.0\na/1 5 3.5\nb/0 5 2.5\nb/x7 5 2.25\n")
    logs = read_logs([tmp_path], How(pattern=r"(?P<arm>\w)/(?P<seed>\w+) (?P<step>\d+) (?P<val_loss>\S+)"))
    assert [(run.arm, run.seed, run.curves["val_loss"][1][0]) for run in logs.runs] == [
        ("a", 0, 3.0), ("a", 1, 3.5), ("b", 0, 2.5), ("b", 1, 2.25)
    ]  # fmt: skip
    assert not logs.paired


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("nano-gpt(", "is not one of nanogpt, build-nanogpt, llm.c, modded-nanogpt nor a regular expression"),
        ("loss (?P<loss>.*)", "must name the groups step and a metric, as in --pattern 'step"),
        (r"(?P<step>\d+) (?P<arm>.*)", "must name the groups step and a metric, as in --pattern 'step"),
        (r"(?P<step>\d+) bits (?P<bits>.*)", "no line matches --pattern"),
        ("llm.c", "no line matches --pattern llm.c"),
        ("", r"no line is known; a pattern names its numbers: --pattern 'step \(\?P<step>"),
    ],
    ids=["no expression", "no step", "no metric", "no match", "other trainer", "unknown"],
)
def test_a_pattern_that_does_not_fit_is_one_sentence(tmp_path: Path, pattern: str, says: str) -> None:
    (tmp_path / "a.log").write_text("step 5 loss 3.0\n")
    with pytest.raises(UserError, match=says) as caught:
        read_logs([tmp_path / "a.log"], How(pattern=pattern))
    assert "\n" not in str(caught.value)


def test_what_is_no_number_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("1 3.0\n2 oops\n3 inf\n")
    logs = read_logs([tmp_path], How(pattern=r"(?P<step>\d) (?P<loss>\w.*)"))
    assert f"{tmp_path / 'a.log'}: 1 values of loss are no numbers" in logs.remarks
    assert [math.isnan(v) for v in logs.runs[0].curves["loss"][1]] == [False, True, True]


def test_a_file_of_any_name_is_read_if_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "slurm-77").write_bytes(b"\xff\xfe\n" + NANOGPT.encode())
    assert len(read_logs([tmp_path / "slurm-77"], How()).runs) == 1
    os.mkfifo(tmp_path / "pipe.log")
    with pytest.raises(UserError):
        read_logs([tmp_path / "pipe.log"], How())


def test_the_example_in_the_sentence_is_a_pattern() -> None:
    (pattern,) = text._asked(text.EXAMPLE.removeprefix("--pattern '").removesuffix("'"))
    match = pattern.search("step 10 | lr 0.1 | val_loss 3.25")
    assert match is not None and match.groupdict() == {"step": "10", "val_loss": "3.25"}
