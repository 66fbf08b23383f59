"""Weights and tokenizers in Hugging Face's format, in and out."""
