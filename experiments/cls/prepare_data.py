"""Prepare EURLEX57K in RoBERTa's tokens, where run.py reads it: data/eurlex57k-roberta-base.

python experiments/cls/prepare_data.py [--from PATH] [--out DIR] ...    # any argument of `gptlab prepare`
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import checkout


def call_of(words: list[str]) -> list[str]:
    return ["prepare", "eurlex57k", "--tokenizer", "roberta-base", *checkout.from_folder(words)]


if __name__ == "__main__":
    checkout.run(call_of)
