"""Ladders: which arms they make, what is refused, and that a branch is the run that trained from the beginning."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from conftest import tiny_recipe
from test_study_runner import Fakes, statuses
from test_study_runner import fakes as fakes
from test_training_resume import assert_same_run, train_until, weights

from gptlab import machine
from gptlab.config import Recipe, Study, build_recipe, load_study
from gptlab.config.plan import plan_hash, study_plan
from gptlab.errors import ConfigError
from gptlab.model.gpt import build_model
from gptlab.planning.device import Device
from gptlab.planning.study import plan_study
from gptlab.report.card import card
from gptlab.rundir import RunDir
from gptlab.study.branching import start_branch
from gptlab.study.launch.resources import Resources
from gptlab.study.launch.submit import launch_study
from gptlab.study.runner import run_study, worker_environment
from gptlab.study.runs import planned_runs
from gptlab.training.checkpoint import checkpoint_step, list_checkpoints, verify
from gptlab.training.loop import train

LADDER = 'baseline = "plain"\n[ladder]\nsizes = ["1x16", "2x16", "2x32"]\n'
ARMS = '[arms.plain]\n[arms.muon]\noptim.name = "muon"\noptim.muon_lr = [0.04, 0.02, 0.01]\n'
WSD: dict[str, Any] = {"schedule__shape": "wsd", "schedule__min_lr": 0.0, "checkpoint__keep_last": 1}


def load(folder: Path, dataset: Path, text: str, **changes: Any) -> Study:
    recipe = tiny_recipe(dataset, **{**WSD, **changes}).model_dump()
    (folder / "mine.toml").write_text(text + tomli_w.dumps({"recipe": recipe}), encoding="utf-8")
    return load_study(folder / "mine.toml")


def test_every_arm_is_at_every_rung_with_the_same_tokens(tmp_path: Path, dataset: Path) -> None:
    study = load(tmp_path, dataset, LADDER + "tokens_per_parameter = [1, 2]\nlr_exponent = 0.5\n" + ARMS)
    assert list(study.arms)[:3] == ["plain@1x16-1tpp", "plain@1x16-2tpp", "plain@2x16-1tpp"] and len(study.arms) == 12
    assert study.baseline == "plain@2x32-2tpp" and study.reference("muon@2x16-1tpp") == "plain@2x16-1tpp"
    built = {arm: study.build(arm, 3) for arm in study.arms}
    assert [(r.model.n_layer, r.model.n_embd, r.model.n_head) for r in built.values()][:6:2] == [
        (1, 16, 1),
        (2, 16, 1),
        (2, 32, 2),
    ]
    parameters = {"1x16": 3072, "2x16": 6144, "2x32": 24576}  # 12 layers width^2
    for arm, recipe in built.items():
        base, size, multiple = study.ladder.place(arm) if study.ladder else ("", "", 0.0)
        assert recipe.train.max_steps == round(multiple * parameters[size] / 256)
        assert recipe.optim.lr == pytest.approx(1e-2 * (parameters[size] / 3072) ** -0.5, rel=1e-5)
        if base == "muon":
            assert recipe.optim.muon_lr == {"1x16": 0.04, "2x16": 0.02, "2x32": 0.01}[size]
    one = load(tmp_path, dataset, LADDER + "tokens_per_step = [128, 256, 512]\n" + ARMS)
    assert [one.build(arm, 0).batch.tokens_per_step for arm in one.arms] == [128, 256, 512] * 2
    assert next(iter(one.arms)) == "plain@1x16" and one.build("plain@1x16", 0).train.max_steps == 20 * 3072 // 128


def test_the_nominal_size_is_the_models_own_weights(dataset: Path) -> None:
    recipe = tiny_recipe(dataset, model__vocab_size=50, model__bias=False)
    model = build_model(recipe.model, "cpu", init=0)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert model.size()["non_embedding_parameters"] - norms == 12 * 2 * 32**2
    untied = build_model(recipe.replace({"model.tied": False}).model, "cpu", init=0)
    assert untied.size() == model.size()


def test_the_studys_own_file_reads_back_the_same_and_a_study_without_a_ladder_keeps_its_plan(
    tmp_path: Path, dataset: Path
) -> None:
    study = load(tmp_path, dataset, LADDER + "tokens_per_parameter = [1, 2]\nbranch = true\n" + ARMS)
    (tmp_path / "study.toml").write_text(study.to_toml(), encoding="utf-8")
    again = load_study(tmp_path / "study.toml")
    assert again.to_toml() == study.to_toml() and again.ladder == study.ladder
    assert [again.build(arm, 3) for arm in again.arms] == [study.build(arm, 3) for arm in study.arms]
    (tmp_path / "other.toml").write_text(f'arms_of = "{tmp_path}/mine.toml"\nrecipe = "{tmp_path}/recipe.toml"\n')
    (tmp_path / "recipe.toml").write_text(tiny_recipe(dataset, **WSD).to_toml(), encoding="utf-8")
    assert list(load_study(tmp_path / "other.toml").arms) == list(study.arms)
    assert "ladder" not in study_plan(load_study("sizes-smoke")) and study_plan(study)["ladder"]["branch"]
    # as registered by versions that knew no ladders
    assert plan_hash(study_plan(load_study("sizes-smoke"))) == (
        "38e1661ff0b46fa8f6d03e58b622927a0403c84af87479545477ea3588daef58"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('sizes = ["2x"]\n', "2x: must be layers x width, such as 4x128"),
        ('sizes = ["2x32", "1x32"]\n', "ladder.sizes = ['2x32', '1x32']: must grow"),
        ('sizes = ["1x24"]\n', "arm plain: ladder.sizes: 1x24: its width must be a multiple of the head size 16"),
        (
            'sizes = ["1x16"]\ntokens_per_parameter = [2, 1]\n',
            "ladder.tokens_per_parameter = [2.0, 1.0]: must be above 0",
        ),
        ('sizes = ["1x16"]\nbranch = true\n', "ladder.branch = true: needs several tokens_per_parameter"),
        ('sizes = ["1x16"]\ntokens_per_step = [64, 64]\n', "ladder.tokens_per_step = [64, 64]: must have one for each"),
        ('sizes = ["1x16"]\nextrapolate = ["big"]\n', "big: must be a number of parameters, such as 124M"),
        ('sizes = ["1x16"]\nhold_out = "largest"\n', "ladder.hold_out = largest: needs two sizes"),
        ('sizes = ["1x16"]\nsteps = 3\n', "no setting 'ladder.steps'"),
        ('sizes = ["1x16"]\n[arms.deep]\nmodel.n_layer = 3\n', "arm deep: sets model.n_layer, which [ladder] sets"),
        (
            'sizes = ["1x16"]\n[arms.a]\noptim.lr = [1e-3, 1e-2]\n',
            "arm a: optim.lr = [0.001, 0.01]: must be one number, or",
        ),
        ('sizes = ["1x16"]\n[arms.a]\nmeasured = "there"\n', "arm a: measured: an arm of a ladder is trained"),
        ('sizes = ["1x16"]\n[arms."a@b"]\n', "arm a@b: is at no rung of [ladder], which makes 1x16"),
        ('sizes = ["1x16"]\n[factors.f]\noptim.lr = 2.0\n', "has [ladder] and [factors]: make the arms of one of them"),
    ],
)
def test_what_is_wrong_with_a_ladder_is_said_in_a_sentence(
    tmp_path: Path, dataset: Path, text: str, sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, dataset, f'baseline = "plain"\n[ladder]\n{text}[arms.plain]\n')
    assert sentence in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schedule__shape": "cosine"}, "schedule.shape = cosine: must be wsd or wsd-sqrt"),
        ({"schedule__decay_steps": 30}, "schedule.decay_steps = 30: must be 0, the end of each run"),
        ({"optim__name": "ademamix"}, "optim.ademamix_warmup = 0: must be a number of steps"),
        ({"sparsity__method": "magnitude"}, "sparsity.method = magnitude: must be none"),
    ],
)
def test_runs_that_their_length_bends_cannot_branch(
    tmp_path: Path, dataset: Path, change: dict[str, Any], sentence: str
) -> None:
    text = LADDER + "tokens_per_parameter = [1, 2]\nbranch = true\n[arms.plain]\n"
    with pytest.raises(ConfigError, match=f"arm plain@1x16-2tpp: ladder.branch = true: {sentence}"):
        load(tmp_path, dataset, text, **change)


# -- branches


def lengths(dataset: Path, **changes: Any) -> tuple[Recipe, Recipe, int]:
    """A long run with the checkpoint that a short one needs, the short one, and the step where it begins."""
    short = tiny_recipe(dataset, **{**WSD, "train__max_steps": 15, "schedule__decay_fraction": 0.4, **changes})
    step = short.schedule.decay_begin(15)
    return short.replace({"train.max_steps": 30, "checkpoint.at": [step]}), short, step


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"schedule__shape": "wsd-sqrt", "optim__name": "muon", "train__ema": 0.9},
        pytest.param({"optim__name": "soap", "data__sampling": "random"}, marks=pytest.mark.slow),
        pytest.param({"optim__name": "adamw-spam", "precision__regime": "bf16_pure"}, marks=pytest.mark.slow),
    ],
)
def test_a_branch_is_bit_for_bit_the_run_from_the_beginning(
    dataset: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    long, short, step = lengths(dataset, **changes)
    assert step == 9 and step % long.checkpoint.every  # no checkpoint that would be there anyway
    trunk, branch = RunDir(tmp_path / "trunk"), RunDir(tmp_path / "branch")
    train(long, trunk.path, quiet=True)
    assert checkpoint_step(list_checkpoints(trunk)[0]) == step
    start_branch(trunk, step, short, branch)
    result = train(short, branch.path, quiet=True)
    whole = train(short, tmp_path / "whole", quiet=True)
    assert (result.status, result.steps, result.final_val_loss) == ("completed", 15, whole.final_val_loss)
    assert_same_run(branch.path, tmp_path / "whole")
    for path in list_checkpoints(trunk):
        verify(path, trunk.read_id())  # the branch has removed its own links alone
    assert branch.read_id() != trunk.read_id()


def test_a_branch_says_where_it_came_from_and_costs_its_own_steps(dataset: Path, tmp_path: Path) -> None:
    long, short, step = lengths(dataset)
    trunk, branch = RunDir(tmp_path / "trunk"), RunDir(tmp_path / "branch")
    train(long, trunk.path, quiet=True)
    spent = verify(trunk.checkpoints / f"step-{step:08d}")["wall_seconds"]
    start_branch(trunk, step, short, branch)
    begun = verify(list_checkpoints(branch)[0], branch.read_id())
    assert (begun["wall_seconds"], begun["cpu_seconds"]) == (0.0, 0.0) and spent > 0
    train(short, branch.path, quiet=True)
    origin = branch.read_json("environment.json")["branch_of"]
    assert (origin["run"], origin["step"], origin["wall_seconds"]) == ("trunk", step, spent)
    assert "branch_of" not in trunk.read_json("environment.json")
    assert f"It branched off trunk at step {step}. The times above are of its own" in card(branch)
    before = weights(branch.path)
    start_branch(trunk, step, short, branch)  # it goes on by itself
    assert all((before[name] == tensor).all() for name, tensor in weights(branch.path).items())


def test_a_branch_without_its_checkpoint_starts_from_the_beginning_and_says_so(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, short, step = lengths(dataset)
    trunk, branch = RunDir(tmp_path / "trunk"), RunDir(tmp_path / "branch")
    start_branch(trunk, step, short, branch)
    train_until(long, trunk.path, step + 1)
    with open(trunk.checkpoints / f"step-{step:08d}/model.safetensors", "ab") as file:
        file.write(b"more")
    start_branch(trunk, step, short, branch)
    says = capsys.readouterr().err
    assert says.count("it starts from the beginning") == 2 and "is damaged" in says
    assert not list_checkpoints(branch)


BRANCHES = LADDER.replace(', "2x16", "2x32"', "") + "tokens_per_parameter = [1, 2]\nbranch = true\n"


def branching(folder: Path, dataset: Path) -> Study:
    return load(
        folder, dataset, 'name = "tiny"\nseeds = [0, 1]\n' + BRANCHES + ARMS.replace("[0.04, 0.02, 0.01]", "0.04")
    )


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_branch_starts_after_its_trunk(tmp_path: Path, dataset: Path, fakes: Fakes, jobs: int) -> None:
    assert run_study(branching(tmp_path, dataset), jobs=jobs, quiet=True) == 0
    order = fakes.started()
    assert len(order) == 8
    if jobs == 1:
        for arm in ("plain", "muon"):
            for seed in (0, 1):
                assert order.index(f"{arm}@1x16-2tpp_seed{seed}") < order.index(f"{arm}@1x16-1tpp_seed{seed}")
    assert len(planned_runs(branching(tmp_path, dataset), Path("results/tiny"), ["muon@*"], [0])) == 2


@pytest.mark.parametrize(
    ("end", "status", "exit"),
    [("diverged", "diverged", 0), ("failed: TypeError: no", "failed", 1), ("not_applicable", "not_applicable", 0)],
)
def test_the_branches_of_a_trunk_that_failed_say_why(
    tmp_path: Path, dataset: Path, fakes: Fakes, end: str, status: str, exit: int
) -> None:
    study = branching(tmp_path, dataset)
    fakes.ends["muon@1x16-2tpp seed 0"] = [end, "completed"]
    assert run_study(study, quiet=True) == exit
    assert "muon@1x16-1tpp_seed0" not in fakes.started()
    folder = Path("results/tiny")
    assert statuses(folder)["muon@1x16-1tpp 0"] == status
    summary = json.loads((folder / "muon@1x16-1tpp_seed0.json").read_text(encoding="utf-8"))
    assert summary["status"] == status
    assert summary["reason"].startswith("muon@1x16-2tpp_seed0, of which it is a branch at step")
    if status == "failed":  # tried again with its trunk
        fakes.ends.clear()
        assert run_study(study, quiet=True) == 0
        assert fakes.started()[-1] == "muon@1x16-1tpp_seed0" and set(statuses(folder).values()) == {"completed"}


def test_a_branch_has_the_threads_of_its_trunk(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "share_of_cores", lambda jobs: 8)
    branch = next(run for run in planned_runs(branching(tmp_path, dataset), tmp_path / "out", None, [0]) if run.trunk)
    branch.trunk[0].path.mkdir(parents=True)
    branch.trunk[0].write_json("environment.json", {"threads": 3})
    assert worker_environment(branch, 0, 1, [])["OMP_NUM_THREADS"] == "3"


def test_on_slurm_branches_are_jobs_after_their_trunks(tmp_path: Path, dataset: Path) -> None:
    study = branching(tmp_path, dataset)
    launch = launch_study(study, tmp_path / "out", None, None, None, "slurm", Resources(), "gptlab launch", show=True)
    assert [part.name for part in launch.parts] == ["arms", "branches", "report"]
    assert {arm for arm, _ in launch.parts[1].runs} == {"plain@1x16-1tpp", "muon@1x16-1tpp"}
    assert launch.parts[1].after == ["arms"]


@pytest.mark.slow
def test_a_ladder_trains_whole_and_its_branches_are_those_of_single_runs(tmp_path: Path, dataset: Path) -> None:
    study = load(tmp_path, dataset, 'name = "tiny"\nseeds = [0]\n' + BRANCHES + "[arms.plain]\n")
    out, arm = tmp_path / "out", "plain@1x16-1tpp"
    train_until(study.build("plain@1x16-2tpp", 0), out / "plain@1x16-2tpp_seed0", 17)  # stopped after the branch
    assert run_study(study, out, quiet=True) == 0
    first = {name: tensor.clone() for name, tensor in weights(out / f"{arm}_seed0").items()}
    assert RunDir(out / f"{arm}_seed0").read_json("environment.json")["branch_of"]["run"] == "plain@1x16-2tpp_seed0"
    shutil.rmtree(out / f"{arm}_seed0")
    (out / f"{arm}_seed0.json").unlink()
    shutil.rmtree(out / "plain@1x16-2tpp_seed0")
    assert run_study(study, out, [arm], quiet=True) == 0  # without its trunk: from the beginning
    alone = out / f"{arm}_seed0"
    assert "branch_of" not in RunDir(alone).read_json("environment.json")
    train(build_recipe(study.build(arm, 0).model_dump()), tmp_path / "single", quiet=True)
    assert_same_run(alone, tmp_path / "single")
    assert all((first[name] == tensor).all() for name, tensor in weights(alone).items())


def test_a_ladder_has_the_same_seeds_at_every_rung(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(ConfigError, match="--until-decided adds seeds to some arms, and a ladder has the same"):
        run_study(branching(tmp_path, dataset), tmp_path / "out", until_decided=True, quiet=True)
    with pytest.raises(ConfigError, match="until_decided adds seeds to some arms, and a ladder has the same"):
        load(tmp_path, dataset, "until_decided = true\n" + LADDER + "[arms.plain]\n")


def test_the_plan_counts_the_steps_that_a_branch_trains_itself(tmp_path: Path, dataset: Path) -> None:
    study = branching(tmp_path, dataset)
    whole = study.model_copy(update={"ladder": study.ladder and study.ladder.model_copy(update={"branch": False})})
    device = Device.named("H100")
    one, two = plan_study(study, device), plan_study(whole, device)
    arm, step = "plain@1x16-1tpp", study.build("plain@1x16-1tpp", 0).schedule.decay_begin(12)
    assert two.arms[arm].hours * (1 - step / 12) == pytest.approx(one.arms[arm].hours) and 0 < step < 12
    assert one.arms["plain@1x16-2tpp"].hours == two.arms["plain@1x16-2tpp"].hours
    assert one.hours < two.hours and any("of its own steps" in note for note in one.arms[arm].notes)
