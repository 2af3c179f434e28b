#!/bin/sh
# PostgreSQL's image runs this once, when its data folder is still empty: a database and a role of its own for MLflow
# and for Prefect, so that neither can read what the other keeps. Passwords never show in `ps`: psql reads them from
# its environment.
set -eu

create() {
    NAME=$1 PASSWORD=$2 psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\getenv name NAME
\getenv password PASSWORD
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE CONNECT ON DATABASE :"name" FROM PUBLIC;
SQL
}

create mlflow "$MLFLOW_DB_PASSWORD"
create prefect "$PREFECT_DB_PASSWORD"
