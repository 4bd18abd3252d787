"""Models in the formats of other libraries: Hugging Face, nanoGPT, 2:4 sparse."""
