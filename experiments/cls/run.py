"""The precision study of classification: an encoder on EURLEX57K, one arm or all; experiments/lm/run.py says the rest.

python experiments/cls/run.py --config amp_bf16 --seed 0
python experiments/cls/run.py --config all --seeds 3
python experiments/cls/run.py --config amp_bf16 --max_iters 100     # a quick test
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lm"))

from run import call

if __name__ == "__main__":
    call("precision-cls", "results/cls")
