"""Optional libraries that are missing, broken or print messages."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch

from gptlab.config import Optim, Precision
from gptlab.errors import NotApplicable
from gptlab.optim.optimizers import make_optimizer
from gptlab.precision.libraries import load_library
from gptlab.precision.regimes import enter_regime

CPU = torch.device("cpu")


def stand_in(name: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create a package with this name and code that hides the real one."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code, encoding="utf-8")
    (folder / name / "float8.py").write_text("", encoding="utf-8")
    (folder / name / "optim.py").write_text("", encoding="utf-8")
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(folder)


BROKEN = {
    "import": ("raise ImportError('cannot import name x from torch')", "ImportError: cannot import name x from torch"),
    "library": (r"raise OSError('libcudart.so.12:\ncannot open')", "OSError: libcudart.so.12: cannot open"),
    "attribute": ("import torch\ntorch.no_such_thing", "AttributeError: .*no_such_thing"),
    "another": ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    "wordless": ("raise RuntimeError", "RuntimeError: no reason given"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_library_is_refused_in_a_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, says = BROKEN[name]
    stand_in("torchao", code, tmp_path, monkeypatch)
    with pytest.raises(NotApplicable, match=says) as refused:
        enter_regime(Precision(regime="fp8_tensorwise"), CPU)
    text = str(refused.value)
    assert text.startswith("precision.regime = fp8_tensorwise: torchao ") and "\n" not in text
    assert f"does not work with PyTorch {torch.__version__}" in text
    assert text.endswith("Run: pip install --upgrade torchao")
    stand_in("bitsandbytes", code, tmp_path, monkeypatch)
    with pytest.raises(NotApplicable, match=rf"optim.name = adamw_8bit on cpu: bitsandbytes .*{says}"):
        make_optimizer(torch.nn.Linear(2, 2), Optim(name="adamw_8bit"))


def test_a_library_without_what_is_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in("lagging", "", tmp_path, monkeypatch)
    load_library("lagging.float8", "a setting")
    with pytest.raises(NotApplicable, match=r"a setting: lagging \(unknown version\) .*no attribute 'quantise'"):
        load_library("lagging.float8", "a setting", "quantise")


def test_an_absent_library_is_named_with_what_installs_it() -> None:
    with pytest.raises(
        NotApplicable, match=r"a setting: needs absent_library, which `pip install 'gptlab\[precision\]'`"
    ):
        load_library("absent_library.float8", "a setting")


def test_what_a_library_says_as_it_loads_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    code = """
import logging, sys, warnings
print("printed")
print("printed too", file=sys.stderr)
logging.getLogger(__name__).warning("Failed to load _C.so")
logging.getLogger("torch").warning("KernelPreference is deprecated")
warnings.warn("deprecated", DeprecationWarning)
warnings.warn("no such extension")
"""
    stand_in("talkative", code, tmp_path, monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_library("talkative", "a setting")
    assert not caught and not caplog.records and capfd.readouterr() == ("", "")
    logging.getLogger("talkative").warning("later")  # later messages are not suppressed
    assert [record.message for record in caplog.records] == ["later"]
