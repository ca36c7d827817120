"""Other people's formats: Hugging Face folders, GGUF files, tokenizers, the source distribution of the built-in dataset."""
