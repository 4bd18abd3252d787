"""The code that an exported folder brings along: it imports torch and transformers, and nothing of gptlab."""
