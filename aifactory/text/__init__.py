"""Text and tokens: the tokenizer, the chat template, the loss mask. The trainer and the server use this same code."""
