-- Run once by the postgres image, on an empty volume. Prefect and MLflow both keep a table alembic_version.
CREATE DATABASE mlflow;
