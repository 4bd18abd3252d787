"""The precision study of classification: an encoder on EURLEX57K. experiments/lm/run.py describes the options.

python experiments/cls/run.py --config amp_bf16 --seed 0
python experiments/cls/run.py --config published --seeds 3          # the published twelve
python experiments/cls/run.py --config all --seeds 3
python experiments/cls/run.py --config amp_bf16 --max_iters 100     # a quick test
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lm"))
from run import PUBLISHED, call

if __name__ == "__main__":
    call("precision-cls", "results/cls", [*PUBLISHED, "amp_bf16_fp32_head", "bf16_body_fp32_head"])
