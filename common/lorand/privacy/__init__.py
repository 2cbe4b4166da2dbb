"""Differential privacy: what noise does (`mechanism`), and what it costs (`accountant`)."""
