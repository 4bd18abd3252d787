"""The network: layers and the GPT (gpt.py), its loss (loss.py), generation (generate.py), hub formats (hub.py)."""
