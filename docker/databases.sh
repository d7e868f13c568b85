#!/bin/sh
# Run once by the PostgreSQL image, when its volume is empty: MLflow and Prefect each own a database, and see no other.
set -eu
database() {
    psql --set ON_ERROR_STOP=1 --username postgres --set name="$1" --set password="$2" <<'SQL'
create role :"name" login password :'password';
create database :"name" owner :"name";
revoke all on database :"name" from public;
SQL
}
database mlflow "$MLFLOW_DB_PASSWORD"
database prefect "$PREFECT_DB_PASSWORD"
