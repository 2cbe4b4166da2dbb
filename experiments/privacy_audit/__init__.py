"""Question: what do a round's scalars tell of the examples behind them, and does the noise hold?

Attacks on the library's own scalars, codes and noise: MiniLM and a small embedding on UCI sentiment
sentences, at the weights of a run under way. The attacker has what every participant has: base
model, directions, coefficients, codes. Attacks bound what leaks from below: better ones exist.

- A1: how much of a gradient comes back, against K over d.
- A2: which words are told, where an embedding is trained.
- A3: which text of a list was measured.
- A4: whether a sentence was in a batch, or in the data, with and without noise.
- A5: what releases with and without a record prove of epsilon, and of planted bugs.
- R: the two halves of ReCIT: a malicious base model, and gradients that can be solved for.

    python -m experiments.privacy_audit                 # all: a quarter of an hour on one core
    python -m experiments.privacy_audit --only A1 A5    # some parts; the others stay as they are
    python -m experiments.privacy_audit --write         # tables and plots from the results
"""
