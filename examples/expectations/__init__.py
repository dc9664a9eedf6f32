"""What `transformers` computes of tiny checkpoints, and the scripts that make both."""
