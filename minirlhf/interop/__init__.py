"""Other people's formats: Hugging Face folders, GGUF files, tokenizers, chat templates, built-in datasets."""
