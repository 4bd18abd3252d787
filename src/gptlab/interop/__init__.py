"""Import and export of models in other formats: Hugging Face, nanoGPT, and 2:4 sparse matrices."""
