"""Prepare OpenWebText in GPT-2's tokens, where run.py reads it: data/openwebtext-gpt2.

python experiments/lm/prepare_data.py [--from PATH] [--out DIR] ...    # any argument of `gptlab prepare`
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import checkout


def call_of(words: list[str]) -> list[str]:
    return ["prepare", "openwebtext", "--tokenizer", "gpt2", *checkout.from_folder(words)]


if __name__ == "__main__":
    checkout.run(call_of)
