-- Who is let into a run whose coordinators share them. `version` counts the writes to its members;
-- `authority` is the SHA-256 of the certificate that all of theirs come from.
CREATE TABLE lorand.membership (
    run text PRIMARY KEY,
    authority text NOT NULL,
    version bigint NOT NULL
);
CREATE TABLE lorand.member (
    run text NOT NULL REFERENCES lorand.membership (run),
    name text NOT NULL,
    role text NOT NULL,
    serial text NOT NULL,
    serial_before text NOT NULL,
    expires double precision NOT NULL,
    revoked integer NOT NULL,
    PRIMARY KEY (run, name)
);
CREATE TABLE lorand.invitation (
    run text NOT NULL REFERENCES lorand.membership (run),
    name text NOT NULL,
    role text NOT NULL,
    token_hash bytea NOT NULL,
    expires double precision NOT NULL,
    PRIMARY KEY (run, name)
);
-- Certificates with which coordinators pass calls on to the one that leads.
CREATE TABLE lorand.coordinator (
    run text NOT NULL REFERENCES lorand.membership (run),
    serial text NOT NULL,
    expires double precision NOT NULL,
    PRIMARY KEY (run, serial)
);
-- Where the run is reached, and where new members enrol.
CREATE TABLE lorand.served (
    run text PRIMARY KEY REFERENCES lorand.membership (run),
    address text NOT NULL,
    enrolment text NOT NULL
);
