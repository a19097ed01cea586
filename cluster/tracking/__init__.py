"""The record of a run: numbers, spooled to disk first, sent to MLflow by one writer."""
