"""OpenWebText as GPT-2's tokens, where the precision study looks for them: data/openwebtext-gpt2.

python experiments/lm/prepare_data.py [--from PATH] [--out DIR] ...    # any argument of `gptlab prepare`
"""

import sys

from gptlab.cli import main

if __name__ == "__main__":
    main(["prepare", "openwebtext", "--tokenizer", "gpt2", *sys.argv[1:]])
