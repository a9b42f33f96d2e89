"""EightGig: fine-tune vision-language models on an 8 GB card, with the memory known beforehand."""

__version__ = "0.1.0"
