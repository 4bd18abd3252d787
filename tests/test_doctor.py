"""gptlab doctor says what is there, names what is missing with the command that adds it, and times a known recipe."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from gptlab.cli import doctor, main


def test_it_says_what_this_machine_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--seconds", "0.01", "--json", str(tmp_path / "facts.json")])
    assert end.value.code == 0
    out = capsys.readouterr().out
    facts = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    assert [line.split("  ")[0].strip() for line in out.splitlines()] == list(facts)
    assert {"gptlab", "PyTorch", "CPU", "packages", "disk", "speed"} <= facts.keys()
    assert re.search(r"[\d,]+ tokens a second .* shakespeare-char-cpu takes about [\d,]+ s", facts["speed"])


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    wants = ["torch>=2.7", "wandb>=0.18; extra == 'wandb'", 'nothing-like-it>=1; extra == "data"', "x; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wants)
    monkeypatch.setattr(doctor, "_version", lambda package: "1" if package == "torch" else "")
    assert doctor.missing_packages() == {"wandb": ["wandb"], "data": ["nothing-like-it"]}
