"""Where training runs: Ray actors, Ray Data, MLflow, jobs, the configuration, the command line."""
