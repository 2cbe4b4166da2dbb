-- What workers say they contributed, each signed by its worker; `sequence` is the last it is about.
CREATE TABLE lorand.statement (
    run text NOT NULL,
    worker bigint NOT NULL,
    sequence bigint NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (run, worker, sequence),
    FOREIGN KEY (run, sequence) REFERENCES lorand.entry (run, sequence)
);
