"""Text to batches: sources of documents, a tokenizer, packed windows, and batches of them."""
