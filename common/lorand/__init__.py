"""LoRand: fine-tune one model on many machines; only seeds and small integers cross the network."""

__version__ = "0.1.0"
