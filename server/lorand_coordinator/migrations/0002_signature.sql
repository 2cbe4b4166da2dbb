-- The coordinator's signatures, each of the history up to an entry and written with it.
CREATE TABLE lorand.signature (
    run text NOT NULL,
    sequence bigint NOT NULL,
    key bytea NOT NULL,
    value bytea NOT NULL,
    PRIMARY KEY (run, sequence),
    FOREIGN KEY (run, sequence) REFERENCES lorand.entry (run, sequence)
);
