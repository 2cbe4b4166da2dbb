-- The ledgers of several runs. `epoch` counts who led a run: each takeover adds one, and every
-- write names the epoch that it is made in.
CREATE TABLE lorand.run (
    name text PRIMARY KEY,
    epoch bigint NOT NULL,
    leader text NOT NULL
);
CREATE TABLE lorand.entry (
    run text NOT NULL REFERENCES lorand.run (name),
    sequence bigint NOT NULL,
    epoch bigint NOT NULL,
    body bytea NOT NULL,
    digest bytea NOT NULL,
    PRIMARY KEY (run, sequence)
);
CREATE TABLE lorand.contribution (
    run text NOT NULL,
    sequence bigint NOT NULL,
    position integer NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (run, sequence, position),
    FOREIGN KEY (run, sequence) REFERENCES lorand.entry (run, sequence)
);
CREATE TABLE lorand.checkpoint (
    run text NOT NULL,
    sequence bigint NOT NULL,
    head bytea NOT NULL,
    committed bigint NOT NULL,
    coefficients bytea NOT NULL,
    state bytea NOT NULL,
    PRIMARY KEY (run, sequence),
    FOREIGN KEY (run, sequence) REFERENCES lorand.entry (run, sequence)
);
