"""The networks: GPT and encoder, their losses, and text generation."""
