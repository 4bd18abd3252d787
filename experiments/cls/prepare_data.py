"""EURLEX57K as RoBERTa's tokens, where the precision study looks for them: data/eurlex57k-roberta-base.

python experiments/cls/prepare_data.py [--from PATH] [--out DIR] ...    # any argument of `gptlab prepare`
"""

import sys

from gptlab.cli import main

if __name__ == "__main__":
    main(["prepare", "eurlex57k", "--tokenizer", "roberta-base", *sys.argv[1:]])
