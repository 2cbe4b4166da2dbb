"""LoRand as a Flower app: Flower carries the messages, LoRand's ledger is the run."""
