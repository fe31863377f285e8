"""Reading and writing of pretrained models, adapters and tokenizers."""
