# What the tests run in place of the public PostgreSQL image, from Debian's package and with the same
# contract: POSTGRES_USER, POSTGRES_DB, POSTGRES_PASSWORD_FILE, the user 999, the volume.
ARG BASE
FROM ${BASE}
ENV DEBIAN_FRONTEND=noninteractive
RUN install -d /etc/postgresql-common \
 && echo 'create_main_cluster = false' > /etc/postgresql-common/createcluster.conf \
 && groupadd --gid 999 postgres && useradd --uid 999 --gid 999 --no-create-home postgres \
 && apt-get -qq update && apt-get -qq install --yes --no-install-recommends postgresql-15 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/lib/postgresql/15 \
 && install -d -o 999 -g 999 -m 0700 /var/lib/postgresql/data /run/postgresql
COPY postgres.sh /usr/local/bin/
ENV PATH=/usr/lib/postgresql/15/bin:/usr/local/bin:/usr/bin:/bin PGDATA=/var/lib/postgresql/data
ENTRYPOINT ["sh", "/usr/local/bin/postgres.sh"]
