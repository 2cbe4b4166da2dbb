"""The demo: one coordinator and three workers on this machine, each with its own reviews."""
